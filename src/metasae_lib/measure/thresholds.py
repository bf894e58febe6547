"""Firing thresholds: BatchTopK's selection depends on the batch, co-occurrence must not.

Feature i fires on a token if its pre-activation exceeds θ_i (appendix A). Three rules give θ:

- `rate`: feature i fires as often as BatchTopK selected it on the calibration tokens. With m_i
  selections, θ_i lies half-way between the m_i-th and the next largest of its pre-activations.
- `eer`: the histogram bin where the share of selected values below it meets the share of
  unselected positive values above it; θ_i is the bin's centre.
- `global`: one θ for all features, the mean of the batch cut-offs.

A feature that was never selected gets θ = +inf under every rule.

Why one streamed pass is exact: a value above the largest batch cut-off was certainly selected and
one below the smallest certainly not, so every θ_i of `rate` lies between the two, and so do the
unselected values that decide where the curves of `eer` cross. Values below that window need only be
counted, and the largest of them kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metasae_lib.measure.passes import by_arm, pre_activations, product_dtype, training_groups
from metasae_lib.measure.patterns import Array, above, count_below
from metasae_lib.study import Artefact, MeasureError, Run, atomic_write
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm, JumpReLU
from metasae_lib.train.kernels.compiled import batch_topk

VERSION = 2  # of the stage
Rule = Literal["rate", "eer", "global"]
RULES: tuple[Rule, ...] = ("rate", "eer", "global")
N_BINS = 200  # of the `eer` histogram: with the default bin width it spans [0, 10)
_MARGIN = 0.2  # first guess of the window around the first batch's cut-off


@dataclass(frozen=True)
class Calibration:
    """What one pass over the calibration tokens says about one dictionary.

    thresholds: rule -> (n,) float32, without `eer` if a cut-off lies beyond its histogram.
    selected: (n,) selections by BatchTopK. cutoffs: the smallest selected value of each batch.
    n_tokens: calibration tokens. off_by: the largest difference, over features, between firings
    above the `rate` threshold and selections; 0 unless values tie exactly at a threshold, as
    bfloat16 products make them.
    """

    thresholds: Mapping[str, Tensor]
    selected: Array
    cutoffs: Array
    n_tokens: int
    off_by: int

    def threshold(self, rule: str) -> Tensor:
        """(n,) float32 under one rule. Raises MeasureError if `eer` had no bin for the cut-offs."""
        if rule not in self.thresholds:
            raise MeasureError(
                f"batch cut-offs reach {self.cutoffs.max():.3g}, beyond the histogram of the eer "
                f"rule: set bin_width above {self.cutoffs.max() / N_BINS:.3g}, or use rate"
            )
        return self.thresholds[rule]


class Calibrator:
    """Takes batches of pre-activations, holds only what lies near the batch cut-offs.

    k: as in BatchTopK. window: (low, high) known to hold every batch cut-off; None guesses one
    from the first batch, and `window_held` then says whether the guess was right.
    """

    def __init__(
        self,
        n_features: int,
        k: int,
        *,
        bin_width: float = 0.05,
        window: tuple[float, float] | None = None,
    ) -> None:
        if not 1 <= k <= n_features:
            raise MeasureError(f"k is {k}: give 1 to {n_features}, as many as there are features")
        self.n_features, self.k, self.bin_width = n_features, k, bin_width
        self.window = window
        self.selected = np.zeros(n_features, np.int64)
        self.cutoffs: list[float] = []
        self.n_tokens = 0
        self._above_window = np.zeros(n_features, np.int64)
        self._near: list[tuple[Array, Array]] = []
        self._below = np.zeros(n_features, np.int64)  # positive values below the window,
        self._largest_below = np.zeros(n_features, np.float32)  # and the largest of them
        self._histogram = np.zeros((n_features, N_BINS), np.int64)  # of the others
        self._histogram_selected = np.zeros((n_features, N_BINS), np.int64)

    def update(self, pre: Tensor) -> None:
        """Add one BatchTopK batch. pre: (b, n) pre-activations, before relu."""
        if pre.ndim != 2 or pre.shape[1] != self.n_features:
            raise MeasureError(
                f"a batch of pre-activations has shape {tuple(pre.shape)}: "
                f"it must be (tokens, {self.n_features})"
            )
        pre = pre.detach().cpu().contiguous()
        window = self.window or self._guess(pre)
        low = np.nextafter(np.float32(window[0]), np.float32(0))
        if not count_below(pre, low, self._below, self._largest_below):
            raise MeasureError("a pre-activation is not finite: look at the residuals it is of")
        self.n_tokens += len(pre)
        pattern, near = above(pre, torch.full((self.n_features,), float(low)))
        features, values = self._select(pre, pattern.indices, near)
        self.selected += np.bincount(features, minlength=self.n_features)
        if len(values) == 0:  # nothing positive in the batch: no selection, no cut-off
            return
        self.window = window
        self.cutoffs.append(float(values.min()))
        inside = near <= np.float32(self.window[1])
        self._above_window += np.bincount(pattern.indices[~inside], minlength=self.n_features)
        self._near.append((pattern.indices[inside], near[inside]))
        self._add(self._histogram, pattern.indices, near)
        self._add(self._histogram_selected, features, values)

    @property
    def window_held(self) -> bool:
        """False if a batch cut-off left the window: pass over the same batches once more."""
        if self.window is None:
            return True
        return self.window[0] <= min(self.cutoffs) and max(self.cutoffs) <= self.window[1]

    def again(self) -> Calibrator:
        """A fresh calibrator with the window that is now known to hold."""
        window = min(self.cutoffs), max(self.cutoffs)
        return Calibrator(self.n_features, self.k, bin_width=self.bin_width, window=window)

    def result(self) -> Calibration:
        """Thresholds under every rule. Raises MeasureError if nothing was ever selected."""
        if not self.cutoffs:
            raise MeasureError("no feature was selected on the calibration tokens: train first")
        if not self.window_held:
            raise MeasureError("the window missed a cut-off: pass the batches to again() as well")
        rate, off_by = self._rate()
        rules = {"rate": rate, "global": np.full(self.n_features, np.mean(self.cutoffs))}
        if max(self.cutoffs) < N_BINS * self.bin_width:
            rules["eer"] = self._eer()
        alive = self.selected > 0
        thresholds = {
            rule: torch.from_numpy(np.where(alive, theta, np.inf).astype(np.float32))
            for rule, theta in rules.items()
        }
        return Calibration(thresholds, self.selected, np.array(self.cutoffs), self.n_tokens, off_by)

    def _guess(self, pre: Tensor) -> tuple[float, float]:
        """A window around the cut-off of a first batch."""
        cutoff = batch_topk(pre, self.k * len(pre))[0].acts.min(initial=np.inf)
        return float(cutoff) * (1 - _MARGIN), float(cutoff) * (1 + _MARGIN)

    def _select(self, pre: Tensor, features: Array, near: Array) -> tuple[Array, Array]:
        """Feature and value of each selected activation of a batch, of which these are the values
        from the window on: the selected are among them unless its cut-off lies below."""
        count = self.k * len(pre)
        if len(near) < count:
            codes, _ = batch_topk(pre, count)
            return codes.cols, codes.acts
        cut = np.partition(near, -count)[-count]
        keep = near > cut
        keep[np.flatnonzero(near == cut)[: count - keep.sum()]] = True  # by lowest flat index
        return features[keep], near[keep]

    def _add(self, histogram: Array, features: Array, values: Array) -> None:
        np.add.at(histogram.ravel(), features.astype(np.int64) * N_BINS + self._bins(values), 1)

    def _rate(self) -> tuple[Array, int]:
        """Thresholds, and the largest difference between firings above them and selections."""
        features, values = (np.concatenate(part) for part in zip(*self._near, strict=True))
        stored = np.bincount(features, minlength=self.n_features) + 2
        every = np.arange(self.n_features)
        # By feature, then downwards, with an infinity above what is stored and a zero below it.
        features = np.concatenate([features, every, every])
        beyond = np.repeat(np.array([np.inf, 0], np.float32), self.n_features)
        keys = np.sort(_keys(features, np.concatenate([values, beyond])))
        values = (~keys.astype(np.uint32)).view(np.float32)
        begin = np.cumsum(stored) - stored
        rank = self.selected - self._above_window  # of the m-th largest among the stored values
        last, next_one = values[begin + rank], values[begin + rank + 1]
        low, high = np.float32(min(self.cutoffs)), np.float32(max(self.cutoffs))
        lower, upper = np.maximum(next_one, low), np.minimum(last, high)
        theta = lower + (upper - lower) / np.float32(2)
        just_below = np.nextafter(last, np.float32(0))
        theta = np.where(theta >= last, just_below, theta)

        # Equal values at the cut cannot be told apart: fire on all of them or on none, whichever
        # comes nearer to the selections.
        edges = _keys(every, last)
        more = np.searchsorted(keys, edges, side="right") - begin - 1 - rank
        fewer = rank + 1 - (np.searchsorted(keys, edges) - begin)
        tied = (self.selected > 0) & (more > 0)
        theta = np.where(tied, np.where(fewer <= more, last, just_below), theta)
        return theta, int(np.minimum(fewer, more)[tied].max(initial=0))

    def _bins(self, values: Array) -> Array:
        """Bin of each value; the last one takes what is beyond."""
        return np.minimum((values * (1 / self.bin_width)).astype(np.int64), N_BINS - 1)

    def _eer(self) -> Array:
        unselected = self._histogram - self._histogram_selected
        # Nothing selected lies below the window, so only the largest value there can hold the
        # crossing off: all its fellows may stand in its bin.
        place = np.arange(self.n_features), self._bins(self._largest_below)
        unselected[place] += self._below
        missed = np.cumsum(self._histogram_selected, axis=1)
        false = unselected.sum(axis=1, keepdims=True) - np.cumsum(unselected, axis=1)
        missed_share = missed / np.maximum(missed[:, -1:], 1)
        false_share = false / np.maximum(unselected.sum(axis=1, keepdims=True), 1)
        return (np.argmax(missed_share >= false_share, axis=1) + 0.5) * self.bin_width


def _keys(features: Array, values: Array) -> Array:
    """Integers in the order of the features and, within one, from the largest value down.

    Bits of positive floats are ordered as the floats are.
    """
    return features.astype(np.uint64) << 32 | ~values.view(np.uint32)


def calibrate(
    batches: Iterable[Tensor] | Tensor, k: int, rule: Rule = "rate", *, bin_width: float = 0.05
) -> Tensor:
    """Thresholds of one dictionary under one rule.

    batches: pre-activations (b, n), one BatchTopK batch each, in an iterable that can be passed
    over twice (a list, say; the second pass is rarely needed); or one such batch. k: as in
    BatchTopK, k·b activations are selected of a batch. bin_width: of the `eer` histogram.
    Returns (n,) float32, +inf for features that were never selected. Under `rate` each feature
    exceeds its threshold exactly as often as it was selected, but for exact ties (see module).
    Raises MeasureError.
    """
    if rule not in RULES:
        raise MeasureError(f"threshold rule '{rule}' is not known: use one of {', '.join(RULES)}")
    if isinstance(batches, Iterator):
        raise MeasureError("calibrate may need two passes: give it a list of batches")
    batches = [batches] if isinstance(batches, Tensor) else batches
    first = next(iter(batches), None)
    if first is None:
        raise MeasureError("there are no calibration batches: give at least one")
    calibrator = Calibrator(first.shape[-1], k, bin_width=bin_width)
    for pre in batches:
        calibrator.update(pre)
    if not calibrator.window_held:
        calibrator = calibrator.again()
        for pre in batches:
            calibrator.update(pre)
    return calibrator.result().threshold(rule)


def calibrate_arms(run: Run, arms: Mapping[str, Arm]) -> dict[str, Calibration]:
    """Calibrate every arm on the calibration role, in one pass, and set `arm.sae.threshold`.

    The rule is `evaluation.threshold_rule`; the thresholds of all rules are returned, by arm name.
    The arms' dictionaries move to the run's device. Calibrations are artefacts: a second call
    reads them.
    """
    residuals = Residuals(run, "calibration")
    for arm in arms.values():
        arm.sae.to(residuals.device)

    def make(missing: dict[str, Artefact]) -> None:
        for name, result in _calibrate(run, residuals, {n: arms[n] for n in missing}).items():
            _save(missing[name], result)

    inputs = by_arm(arms, calibration_inputs(run, residuals))
    artefacts = run.made("thresholds", inputs, VERSION, make)
    results = {name: _load(artefact) for name, artefact in artefacts.items()}
    for name, arm in arms.items():
        theta = results[name].threshold(run.profile.evaluation.threshold_rule)
        arm.sae.threshold = theta.to(residuals.device)
    return results


def calibration_inputs(run: Run, residuals: Residuals) -> dict[str, Any]:
    """What thresholds depend on besides the arm, for keys. residuals: of the calibration role."""
    training = run.profile.training
    return {
        "on": residuals.inputs, "dtype": training.dtype, "batch_tokens": training.batch_tokens
    }  # fmt: skip


class OwnThresholds:
    """In a Calibrator's place for a JumpReLU dictionary, which was trained with thresholds."""

    window_held = True

    def __init__(self, threshold: Tensor) -> None:
        self._threshold = threshold
        self._selected = torch.zeros_like(threshold, dtype=torch.int64)
        self._n_tokens = 0

    def update(self, pre: Tensor) -> None:
        """Count what fires. pre: (b, n)."""
        self._selected += (pre > self._threshold).sum(0)
        self._n_tokens += len(pre)

    def again(self) -> OwnThresholds:
        """Never needed."""
        return self

    def result(self) -> Calibration:
        """Its own thresholds under every rule; dead features +inf; no batch cut-offs."""
        theta = torch.where(self._selected > 0, self._threshold, torch.inf).cpu()
        selected = self._selected.cpu().numpy()
        return Calibration(dict.fromkeys(RULES, theta), selected, np.empty(0), self._n_tokens, 0)


def _calibrate(run: Run, residuals: Residuals, arms: Mapping[str, Arm]) -> dict[str, Calibration]:
    dtype = product_dtype(run)
    open_ones: dict[str, Calibrator | OwnThresholds] = {
        name: OwnThresholds(arm.sae.threshold)
        if isinstance(arm.sae, JumpReLU)
        else Calibrator(arm.sae.n_features, arm.sae.k)
        for name, arm in arms.items()
    }
    results: dict[str, Calibration] = {}
    while open_ones:  # a second time only for arms whose first guess of the window failed
        what = f"calibrating {len(open_ones)} arms"
        for tokens, sizes in training_groups(run, residuals, residuals.n_tokens, what):
            for name, calibrator in open_ones.items():
                sae = arms[name].sae
                for pre in pre_activations(sae, tokens.of(sae), dtype).split(sizes):
                    calibrator.update(pre)
        results |= {name: one.result() for name, one in open_ones.items() if one.window_held}
        open_ones = {name: one.again() for name, one in open_ones.items() if not one.window_held}
    return results


def _save(artefact: Artefact, result: Calibration) -> None:
    arrays: dict[str, Any] = {rule: theta.numpy() for rule, theta in result.thresholds.items()}
    with atomic_write(artefact.folder / "thresholds.npz") as path:
        np.savez(path, selected=result.selected, cutoffs=result.cutoffs, **arrays)
    about = {"n_tokens": result.n_tokens, "off_by": result.off_by}
    artefact.finish(about)


def _load(artefact: Artefact) -> Calibration:
    info = artefact.info
    with np.load(artefact.folder / "thresholds.npz") as arrays:
        return Calibration(
            {rule: torch.from_numpy(arrays[rule]) for rule in RULES if rule in arrays},
            arrays["selected"],
            arrays["cutoffs"],
            info["n_tokens"],
            info["off_by"],
        )
