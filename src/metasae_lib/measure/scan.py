"""The scan: co-firing above the thresholds counted for every arm of a run in one pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metasae_lib.measure.counting import CooccurrenceCounter, Counts
from metasae_lib.measure.passes import (
    by_arm,
    counts_bytes,
    in_memory,
    pre_activations,
    product_dtype,
    scan_chunks,
)
from metasae_lib.measure.patterns import Array, Pattern, above
from metasae_lib.measure.thresholds import Calibration, calibrate_arms, calibration_inputs
from metasae_lib.study import Artefact, Run, atomic_write
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm

VERSION = 2  # of the stages
_CHECKPOINT_SECONDS = 120
SCALES = (0.9, 0.95, 1.05, 1.1)  # of every threshold, for the elasticity of mean |φ|
SENSITIVITY_FEATURES = 512  # features whose pairs are counted under other thresholds as well


def scan_arms(run: Run, arms: Mapping[str, Arm]) -> dict[str, Counts]:
    """Count co-firing above the thresholds for every arm, in one pass over the scan role, or in as
    few as memory allows.

    Thresholds are calibrated if they are not yet. Counts are artefacts, one an arm: what is there
    is read, only what is missing is counted. A killed scan goes on from its last checkpoint and
    ends with the same integers. Returns counts by arm name, with n11 memory-mapped.
    """
    calibrations = calibrate_arms(run, arms)
    residuals = Residuals(run, "scan")

    def make(missing: dict[str, Artefact]) -> None:
        what = "the counts of one arm"
        for group in in_memory(list(missing), counts_bytes(arms), what, residuals.device):
            scans = [ArmScan(run, arms[n], calibrations[n], missing[n]) for n in group]
            _scan(run, residuals, scans)

    inputs = by_arm(arms, scan_inputs(run, residuals))
    artefacts = run.made("counts", inputs, VERSION, make)
    return {name: load_counts(artefact, "n11") for name, artefact in artefacts.items()}


def counts_artefact(run: Run, arm: Arm, inputs: Mapping[str, Any]) -> Artefact:
    """Where the counts of an arm are kept. inputs: of :func:`scan_inputs`."""
    return run.artefact("counts", {"arm": arm.folder.name, **inputs}, VERSION)


class ArmScan:
    """The counting of one arm: at its thresholds, and for some features at others as well.

    A checkpoint in the artefact's folder is gone on from.
    """

    def __init__(self, run: Run, arm: Arm, calibration: Calibration, artefact: Artefact) -> None:
        self.sae, self.artefact = arm.sae, artefact
        self.device = arm.sae.b_dec.device
        n = arm.sae.n_features
        rule = run.profile.evaluation.threshold_rule
        base = calibration.threshold(rule).numpy()
        scales = {f"scale-{scale:g}": base * np.float32(scale) for scale in SCALES}
        others = {f"rule-{one}": theta.numpy() for one, theta in calibration.thresholds.items()}
        self.thresholds = {"base": base, **scales, **others}
        del self.thresholds[f"rule-{rule}"]
        few = min(n, SENSITIVITY_FEATURES)
        self.features = np.arange(few) * n // few  # evenly spread
        self.lowest = np.minimum.reduce(list(self.thresholds.values()))
        self.renumber = np.full(n, -1)
        self.renumber[self.features] = np.arange(len(self.features))
        self.counter = CooccurrenceCounter(n, device=self.device)
        self.others = {
            name: CooccurrenceCounter(few, device=self.device) for name in self.thresholds
        }
        self.fired = dict.fromkeys(self.thresholds, 0)
        self.next_chunk, self.seconds = 0, 0.0
        self.partial = artefact.folder / "partial.npz"
        if self.partial.exists():
            with np.load(self.partial) as state:
                self._restore(state)

    def add(self, pre: Tensor) -> None:
        """Add the pre-activations (t, n) of some tokens."""
        if self.device.type == "cpu":
            pattern, values = above(pre, torch.from_numpy(self.lowest))
            number = self.renumber[pattern.indices]
            renumbered = Pattern(pattern.indptr, number.astype(pattern.indices.dtype))
            for name, theta in self.thresholds.items():
                kept = values > theta[pattern.indices]
                self.fired[name] += int(kept.sum())
                self.others[name].update(renumbered.where(kept & (number >= 0)))
                if name == "base":
                    self.counter.update(pattern.where(kept))
            return
        for name, theta in self.thresholds.items():
            fires = pre > torch.from_numpy(theta).to(pre.device)
            self.fired[name] += int(fires.sum())
            self.others[name].update(fires[:, torch.from_numpy(self.features).to(pre.device)])
            if name == "base":
                self.counter.update(fires)

    def checkpoint(self) -> None:
        """Write everything that a later process needs to go on."""
        state = {
            f"{name}/{key}": array
            for name, counter in {"counter": self.counter, **self.others}.items()
            for key, array in counter.state().items()
        }
        state["made"] = np.array([self.next_chunk, self.seconds, *self.fired.values()])
        with atomic_write(self.partial) as path:
            np.savez(path, **state)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Write the artefact."""
        for name, counter in {"n11": self.counter, **self.others}.items():
            save_counts(self.artefact, name, counter.counts())
        self.partial.unlink(missing_ok=True)
        fired = {name: total / self.counter.n_tokens for name, total in self.fired.items()}
        self.artefact.finish(
            {"n_tokens": self.counter.n_tokens, "l0": fired, "seconds": round(self.seconds, 1)}
        )

    def _restore(self, state: Mapping[str, Array]) -> None:
        for name, counter in {"counter": self.counter, **self.others}.items():
            counter.restore({key: state[f"{name}/{key}"] for key in counter.state()})
        chunk, self.seconds, *fired = state["made"].tolist()
        self.next_chunk = int(chunk)
        self.fired = {name: int(n) for name, n in zip(self.thresholds, fired, strict=True)}


def _scan(run: Run, residuals: Residuals, scans: Sequence[ArmScan]) -> None:
    dtype = product_dtype(run)
    first = min(scan.next_chunk for scan in scans)
    saved = time.monotonic()
    for i, parts in scan_chunks(residuals, f"scanning {len(scans)} arms", first):
        open_ones = [scan for scan in scans if scan.next_chunk == i]
        started = time.monotonic()
        for tokens in parts:
            for scan in open_ones:
                scan.add(pre_activations(scan.sae, tokens.of(scan.sae), dtype))
        for scan in open_ones:
            scan.next_chunk += 1
            scan.seconds += (time.monotonic() - started) / len(scans)
        if time.monotonic() - saved > _CHECKPOINT_SECONDS and i + 1 < residuals.n_chunks:
            for scan in scans:
                scan.checkpoint()
            saved = time.monotonic()
    for scan in scans:
        scan.finish()


def scan_inputs(run: Run, residuals: Residuals) -> dict[str, Any]:
    """What counts depend on besides the arm, for keys. residuals: of the scan role."""
    return {
        "on": residuals.inputs,
        "calibration": calibration_inputs(run, Residuals(run, "calibration")),
        "rule": run.profile.evaluation.threshold_rule,
    }


def save_counts(artefact: Artefact, name: str, counts: Counts) -> None:
    """Write counts into an artefact, for `load_counts`; its info must have their `n_tokens`."""
    for suffix, array in (("", counts.n11), ("-n1", counts.n1)):
        with atomic_write(artefact.folder / f"{name}{suffix}.npy") as path:
            np.save(path, array)


def load_counts(artefact: Artefact, name: str) -> Counts:
    """Counts of a scan's artefact: `n11`, or one of those under other thresholds."""
    info = artefact.info
    return Counts(
        np.load(artefact.folder / f"{name}.npy", mmap_mode="r"),
        np.load(artefact.folder / f"{name}-n1.npy"),
        info["n_tokens"],
    )
