"""Calibrated dictionaries as folders that SAELens reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from metasae_lib.measure.fidelity import measure_arms
from metasae_lib.study import Run
from metasae_lib.train import Arm
from metasae_lib.train.training import described


def export_arms(run: Run, arms: Mapping[str, Arm], folder: str | os.PathLike[str]) -> list[Path]:
    """Write every arm at its thresholds, in a folder of its name under `folder`; returns these.

    The metadata of its cfg.json hold, besides model, hook, context and BOS: threshold_rule,
    l0 (features that fire on a token of held-out text, at the thresholds), dead (features that were
    never selected on the calibration tokens, whose threshold is infinite), and l2 and fvu as of
    `measure_arms`, which is called.
    """
    folders = []
    for row in measure_arms(run, arms).to_dict("records"):
        measured = {
            "threshold_rule": run.profile.evaluation.threshold_rule,
            "l0": row["l0_threshold"],
            "dead": row["dead"],
            "l2": row["l2"],
            "fvu": row["fvu"],
        }
        name = row["arm"]
        folders.append(Path(folder) / name)
        arms[name].sae.save(folders[-1], described(run.profile, name) | measured)
    return folders
