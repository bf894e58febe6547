"""How mean |φ| answers to choices that have nothing to do with the training objective.

Thresholds, position 0, BOS and the choice of pairs each move mean |φ|; what they move it by is the
scale against which the effect of joint training is to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csc_array, diags_array

from metasae_lib.measure.counting import CooccurrenceCounter, Counts
from metasae_lib.measure.cross import firing
from metasae_lib.measure.fidelity import first_position
from metasae_lib.measure.passes import (
    Entered,
    counts_bytes,
    in_memory,
    pre_activations,
    product_dtype,
)
from metasae_lib.measure.phi import summarise
from metasae_lib.measure.scan import SCALES, counts_artefact, load_counts, scan_arms, scan_inputs
from metasae_lib.study import Artefact, Run, atomic_write, progress
from metasae_lib.subject import Residuals, Subject, load_tokens, subject_of
from metasae_lib.train import Arm

VERSION = 1  # of the stage
_MIN_FIRINGS = 100  # firings that another choice of pairs asks of both features
_ROWS = 512  # of the counts of a pair that are made at a time
_FREQUENT = 0.01  # share of features, the most frequent, that one choice of pairs leaves out


def sensitivity(
    run: Run, arms: Mapping[str, Arm], subject: Subject | None = None, bos_rows: int = 256
) -> pd.DataFrame:
    """mean |φ| of every arm under other choices than the profile's, one row each.

    Columns: arm, kind, group, variant, scale (of θ, or nan), l0, n_pairs, mean_abs,
    null_mean_abs, change_pct (of mean_abs, against the variant "base" of the same group and arm);
    nan where fewer than two features are left.
    Groups, each with a base of its own:

    - `thresholds`: every θ scaled, and the other rules, counted in the scan over the pairs of
      `SENSITIVITY_FEATURES` features;
    - `position 0`: all pairs, with the first position of every row as well (without, should the
      profile keep it). What it holds depends on the first token alone;
    - `BOS` (under bos: every_row): the first `bos_rows` rows run with and without their BOS token,
      measured on the same tokens, with the same thresholds;
    - `pairs`: all alive features; those that fire at least 100 times; without the most frequent 1%.

    The scan must have been made or is made now; the language model is loaded for the second and
    third group unless `subject` is given. The table is an artefact.
    """
    counts = scan_arms(run, arms)
    residuals = Residuals(run, "scan")
    inputs = scan_inputs(run, residuals)

    def make(missing: dict[str, Artefact]) -> None:
        model = subject or subject_of(run)
        rows = _first_position(run, arms, counts, model)
        if run.profile.text.bos == "every_row":
            what = "the counts of one arm with and without BOS"
            for group in in_memory(list(arms), 2 * counts_bytes(arms), what, residuals.device):
                rows += _without_bos(run, {n: arms[n] for n in group}, model, bos_rows)
        for name in arms:
            rows += _other_thresholds(name, counts_artefact(run, arms[name], inputs))
            rows += _other_pairs(name, counts[name])
        table = pd.DataFrame(rows)
        table["kind"] = table.arm.map({name: arm.spec.kind for name, arm in arms.items()})
        with atomic_write(missing["all"].folder / "sensitivity.csv") as path:
            table.to_csv(path, index=False)
        missing["all"].finish()

    folders = {name: arm.folder.name for name, arm in arms.items()}
    asked = {"all": {"arms": folders, "bos_rows": bos_rows, **inputs}}
    made = run.made("sensitivity", asked, VERSION, make)["all"]
    frame = pd.read_csv(made.folder / "sensitivity.csv")
    base = frame[frame.variant == "base"].set_index(["arm", "group"]).mean_abs
    reference = base.loc[pd.MultiIndex.from_frame(frame[["arm", "group"]])].to_numpy()
    frame["change_pct"] = 100 * (frame.mean_abs / reference - 1)
    frame.insert(1, "kind", frame.pop("kind"))
    order = list(arms)
    return frame.sort_values(
        "arm", key=lambda names: names.map(order.index), kind="stable", ignore_index=True
    )


def headline_by_choice(frame: pd.DataFrame, solo: str, joint: str) -> pd.DataFrame:
    """The change of mean |φ| from one arm to another under every choice of `sensitivity`.

    Columns: group, variant, solo, joint (mean_abs of each), change_pct.
    """
    keys = ["group", "variant"]
    both = [frame[frame.arm == name].set_index(keys).mean_abs for name in (solo, joint)]
    table = pd.concat(both, axis=1, keys=["solo", "joint"]).reset_index()
    table["change_pct"] = 100 * (table.joint / table.solo - 1)
    return table


def _row(
    arm: str, group: str, variant: str, counts: Counts, features: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    alive = counts.alive if features is None else counts.alive & features
    summary = summarise(counts, features, (0.5,)) if alive.sum() > 1 else None
    return {
        "arm": arm,
        "group": group,
        "variant": variant,
        "scale": np.nan,
        "l0": counts.l0,
        "n_pairs": summary.n_pairs if summary else 0,
        "mean_abs": summary.mean_abs if summary else np.nan,
        "null_mean_abs": summary.null_mean_abs if summary else np.nan,
    }


def _other_thresholds(arm: str, made: Artefact) -> list[dict[str, Any]]:
    scales = {"base": 1.0, **{f"scale-{scale:g}": scale for scale in SCALES}}
    return [
        _row(arm, "thresholds", name, load_counts(made, name))
        | {"scale": scales.get(name, np.nan), "l0": l0}
        for name, l0 in made.info["l0"].items()
    ]


def _other_pairs(arm: str, counts: Counts) -> list[dict[str, Any]]:
    ceiling = np.quantile(counts.n1[counts.alive], 1 - _FREQUENT)
    choices = {
        "base": None,
        f"at least {_MIN_FIRINGS} firings": counts.n1 >= _MIN_FIRINGS,
        "without the most frequent 1%": counts.n1 <= ceiling,
    }
    return [_row(arm, "pairs", name, counts, features) for name, features in choices.items()]


def _first_position(
    run: Run, arms: Mapping[str, Arm], counts: Mapping[str, Counts], subject: Subject
) -> list[dict[str, Any]]:
    x, times = first_position(run, "scan", subject)
    tokens = Entered(x)
    skipped = run.profile.text.skip_first
    sign, variant = (1, "with position 0") if skipped else (-1, "without position 0")
    rows = []
    for name, arm in arms.items():
        inputs = tokens.of(arm.sae).to(arm.sae.b_dec.device)
        pre = pre_activations(arm.sae, inputs, product_dtype(run))
        assert arm.sae.threshold is not None
        fired = csc_array((pre > arm.sae.threshold).cpu().numpy()).astype(np.int64)
        weighted = diags_array(sign * times, dtype=np.int64) @ fired
        n11 = np.array(counts[name].n11)
        for first in range(0, len(n11), _ROWS):  # a second matrix of its size would not fit
            part = slice(first, first + _ROWS)
            n11[part] += (weighted[:, part].T @ fired).toarray()
        n_tokens = counts[name].n_tokens + sign * int(times.sum())
        other = Counts(n11, counts[name].n1 + weighted.sum(axis=0), n_tokens)
        for which, of in (("base", counts[name]), (variant, other)):
            rows.append(_row(name, "position 0", which, of))
    return rows


def _without_bos(
    run: Run, arms: Mapping[str, Arm], subject: Subject, n_rows: int
) -> list[dict[str, Any]]:
    counters = {
        (name, variant): CooccurrenceCounter(arm.sae.n_features, device=arm.sae.b_dec.device)
        for name, arm in arms.items()
        for variant in ("base", "without BOS")
    }
    rows, batch = load_tokens(run).rows("scan")[:n_rows], run.profile.model.batch_rows
    dtype = product_dtype(run)
    with progress(2 * rows.size, "the same rows with and without BOS") as bar:
        for start in range(0, len(rows), batch):
            ids = np.asarray(rows[start : start + batch])
            # Either way what is measured begins with the second token of the text: the first one
            # takes position 0 in a row without BOS.
            for variant, x in (
                ("base", subject.residuals(ids)[:, 2:]),
                ("without BOS", subject.residuals(ids[:, 1:])[:, 1:]),
            ):
                tokens = Entered(x.flatten(0, 1))
                for name, arm in arms.items():
                    pre = pre_activations(arm.sae, tokens.of(arm.sae), dtype)
                    fired = firing(pre, arm.sae.threshold)
                    counters[name, variant].update(fired)
                bar.update(ids.size)
    return [
        _row(name, "BOS", variant, counter.counts())
        for (name, variant), counter in counters.items()
    ]
