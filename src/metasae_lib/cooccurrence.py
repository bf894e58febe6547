"""Exact co-occurrence counts, the φ coefficient over all pairs, and what chance alone gives.

    φ(i,j) = (N N11 - N1i N1j) / sqrt(N1i (N - N1i) N1j (N - N1j))                  (Eq. 1)

with N tokens, N11 tokens on which both features fire, N1 those on which one does. Counts are
integers and exact at any size; φ is float64, undefined (nan) for a feature that fires never or
always, and undefined pairs are counted, not zeroed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.activations import Residuals
from metasae_lib.counting import Array, Pattern, above, add_pairs, index_type, restrict
from metasae_lib.dictionary import normalise
from metasae_lib.errors import MeasureError
from metasae_lib.progress import progress
from metasae_lib.run import atomic_write, locked
from metasae_lib.thresholds import (
    Calibration,
    calibrate_arms,
    calibration_inputs,
    pre_activations,
    product_dtype,
)

if TYPE_CHECKING:
    from metasae_lib.run import Artefact, Run
    from metasae_lib.training import Arm

VERSION = 2  # of the stages
INT32_MAX = 2**31 - 1  # no count exceeds the number of tokens, so int32 holds all up to here
FLOAT32_EXACT = 2**24  # integers up to here are exact in float32
FLUSH_ENTRIES = 2**22  # pattern entries counted at once: their lists still fit the CPU's cache
DENSE_ADVANTAGE = 100  # multiply-adds of a float32 product in the time of one sparse increment
_BLOCK_ROWS = 2048  # rows of counts a dense product makes at a time
_CHECKPOINT_SECONDS = 120


# --------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class Counts:
    """Counts of a scan within one dictionary.

    n11: (n, n) integers, symmetric, n1 on the diagonal (in memory or on disk). n1: (n,) int64
    tokens on which each feature fires. n_tokens: tokens scanned.
    """

    n11: Array
    n1: Array
    n_tokens: int

    @property
    def alive(self) -> Array:
        """(n,) bool: features whose φ with others is defined."""
        return (self.n1 > 0) & (self.n1 < self.n_tokens)

    @property
    def rates(self) -> Array:
        """(n,) share of tokens on which each feature fires."""
        return self.n1 / self.n_tokens

    @property
    def l0(self) -> float:
        """Mean number of features that fire on a token."""
        return float(self.n1.sum() / self.n_tokens)


@dataclass(frozen=True)
class CrossCounts:
    """Counts between two dictionaries over the same tokens: n11 (n_a, n_b), n1_a, n1_b."""

    n11: Array
    n1_a: Array
    n1_b: Array
    n_tokens: int


class CooccurrenceCounter:
    """Counts co-occurring pairs chunk by chunk, within one dictionary or between two.

    n_a, n_b: numbers of features; n_b None counts within one dictionary. device: where the counts
    are kept. On a CPU pairs are counted one by one from sparse patterns, or by a float32 product
    where patterns are so dense that this is cheaper; on a GPU by products. The integers are the
    same.
    """

    def __init__(
        self, n_a: int, n_b: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if n_a < 1 or (n_b is not None and n_b < 1):
            raise MeasureError(f"cannot count {n_a} by {n_b} features: give positive numbers")
        self.n_a, self.n_b = n_a, n_b
        self.device = torch.device(device)
        self.n_tokens = 0
        self._n11 = torch.zeros(n_a, n_b or n_a, dtype=torch.int32, device=self.device)
        self._n1_a = torch.zeros(n_a, dtype=torch.int64)
        self._n1_b = torch.zeros(n_b, dtype=torch.int64) if n_b else self._n1_a
        self._waiting: list[tuple[Pattern, Pattern | None]] = []
        self._entries = 0

    def update(self, fired_a: Any, fired_b: Any = None) -> None:
        """Add tokens. fired_a: (t, n_a), fired_b: (t, n_b) or None as at construction.

        Bool (or 0/1 integer) torch tensors or NumPy arrays, or sparse CSR matrices of torch or
        SciPy in which every stored non-zero counts as firing, once if stored twice; or a
        `counting.Pattern`.
        Raises MeasureError on shapes that do not fit.
        """
        if (fired_b is None) != (self.n_b is None):
            raise MeasureError(
                "give fired_b exactly if the counter was made for two dictionaries (n_b)"
            )
        if self.device.type == "cpu":
            self._add(
                _pattern(fired_a, self.n_a),
                None if self.n_b is None else _pattern(fired_b, self.n_b),
            )
            return
        a = _dense(fired_a, self.n_a).to(self.device)
        b = None if self.n_b is None else _dense(fired_b, self.n_b).to(self.device)
        self._grow(len(a), None if b is None else len(b))
        self._n1_a += a.sum(0).cpu()
        if b is not None:
            self._n1_b += b.sum(0).cpu()
        self._add_product(a, b)

    @property
    def n11(self) -> Tensor:
        """Exact counts, a new int64 tensor: (n_a, n_a) symmetric with n1 on the diagonal, or
        (n_a, n_b)."""
        return self._finished().to(torch.int64)

    @property
    def n1_a(self) -> Tensor:
        """(n_a,) int64: tokens on which each feature of the first dictionary fires."""
        return self._n1_a.clone()

    @property
    def n1_b(self) -> Tensor:
        """(n_b,) int64 for the second dictionary; that of the first if there is one only."""
        return self._n1_b.clone()

    def counts(self) -> Counts:
        """The counts within one dictionary, without a copy: valid until the next update."""
        if self.n_b is not None:
            raise MeasureError("this counter is between two dictionaries: use cross_counts()")
        return Counts(self._finished().cpu().numpy(), self._n1_a.numpy().copy(), self.n_tokens)

    def cross_counts(self) -> CrossCounts:
        """The counts between two dictionaries, without a copy: valid until the next update."""
        if self.n_b is None:
            raise MeasureError("this counter is within one dictionary: use counts()")
        n11 = self._finished().cpu().numpy()
        return CrossCounts(n11, self._n1_a.numpy().copy(), self._n1_b.numpy().copy(), self.n_tokens)

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` continues from, to the same integers."""
        return {
            "n11": self._finished().cpu().numpy(),
            "n1_a": self._n1_a.numpy(),
            "n1_b": self._n1_b.numpy(),
            "n_tokens": np.array(self.n_tokens),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`."""
        self._waiting, self._entries = [], 0
        self._n11 = torch.from_numpy(np.array(state["n11"])).to(self.device)
        self._n1_a = torch.from_numpy(np.array(state["n1_a"]))
        self._n1_b = torch.from_numpy(np.array(state["n1_b"])) if self.n_b else self._n1_a
        self.n_tokens = int(state["n_tokens"])

    def _add(self, a: Pattern, b: Pattern | None) -> None:
        self._grow(len(a.indptr) - 1, None if b is None else len(b.indptr) - 1)
        for pattern, n1 in ((a, self._n1_a), (b, self._n1_b)):
            if pattern is not None:
                n1 += torch.from_numpy(np.bincount(pattern.indices, minlength=len(n1)))
        fires = np.diff(a.indptr)
        if b is None:
            increments = float(fires @ (fires - 1)) / 2
            multiply_adds = len(fires) * self._n11.numel() / 2
        else:
            increments = float(fires @ np.diff(b.indptr))
            multiply_adds = float(len(fires) * self._n11.numel())
        if increments * DENSE_ADVANTAGE > multiply_adds:
            dense_b = None if b is None else _from_pattern(b, self._n11.shape[1])
            self._add_product(_from_pattern(a, self.n_a), dense_b)
            return
        self._waiting.append((a, b))
        self._entries += len(a.indices) + (0 if b is None else len(b.indices))
        if self._entries >= FLUSH_ENTRIES:
            self._flush()

    def _grow(self, n_tokens: int, n_tokens_b: int | None) -> None:
        if n_tokens_b not in (None, n_tokens):
            raise MeasureError(
                f"fired_a has {n_tokens} tokens and fired_b {n_tokens_b}: give the same tokens"
            )
        self.n_tokens += n_tokens
        if self.n_tokens > INT32_MAX and self._n11.dtype == torch.int32:
            self._n11 = self._n11.to(torch.int64)

    def _flush(self) -> None:
        if self._waiting:
            a = _joined([a for a, _ in self._waiting])
            b = None if self.n_b is None else _joined([b for _, b in self._waiting if b])
            add_pairs(self._n11.numpy(), a, b)
            self._waiting, self._entries = [], 0

    def _add_product(self, a: Tensor, b: Tensor | None) -> None:
        """Add Aᵀ B for dense bool (t, n_a) and (t, n_b); without b, Aᵀ A from the diagonal on."""
        # Zeros and ones are exact in bfloat16, and their sums up to 2^24 in the float32 result.
        on_gpu = self.device.type == "cuda"
        a = a.to(torch.bfloat16 if on_gpu else torch.float32)
        other = a if b is None else b.to(a.dtype)
        for tokens in torch.arange(len(a)).split(FLOAT32_EXACT):
            left, right = a[tokens[0] : tokens[-1] + 1], other[tokens[0] : tokens[-1] + 1]
            for row in range(0, self.n_a, _BLOCK_ROWS):
                first = row if b is None else 0
                rows, columns = left[:, row : row + _BLOCK_ROWS].T, right[:, first:]
                sums = (
                    torch.mm(rows, columns, out_dtype=torch.float32) if on_gpu else rows @ columns
                )
                self._n11[row : row + _BLOCK_ROWS, first:] += sums.to(self._n11.dtype)

    def _finished(self) -> Tensor:
        """The accumulator with everything counted; of one dictionary mirrored in place.

        Only the part above the diagonal is ever added up, so mirroring does no harm to counting.
        """
        self._flush()
        if self.n_b is None:
            for row in range(0, self.n_a, _BLOCK_ROWS):
                rows = slice(row, row + _BLOCK_ROWS)
                diagonal = self._n11[rows, rows].triu(1)
                self._n11[rows, rows] = diagonal + diagonal.T
                self._n11[row + _BLOCK_ROWS :, rows] = self._n11[rows, row + _BLOCK_ROWS :].T
            n1 = self._n1_a.to(self.device, self._n11.dtype)
            self._n11.diagonal().copy_(n1)
        return self._n11


def _pattern(fired: Any, n: int) -> Pattern:
    """Any accepted form of firing -> sorted CSR without repeats."""
    if isinstance(fired, Pattern):
        return fired
    stored = scipy.sparse.issparse(fired)
    if isinstance(fired, Tensor):
        fired = fired.detach().cpu()
        if fired.layout == torch.sparse_csr:
            parts = fired.values(), fired.col_indices(), fired.crow_indices()
            values, columns, rows = (part.numpy() for part in parts)
            fired, stored = (
                scipy.sparse.csr_array((values, columns, rows), tuple(fired.shape)),
                True,
            )
        else:
            fired = fired.numpy()
    if fired.ndim != 2 or fired.shape[1] != n:
        raise MeasureError(f"firing of shape {tuple(fired.shape)} does not fit: give (tokens, {n})")
    if not stored:
        if fired.dtype.kind not in "biu":
            raise MeasureError(f"firing is of type {fired.dtype}: give bool, such as acts > 0")
        dense = np.ascontiguousarray(fired) != 0
        return above(dense.view(np.uint8), np.zeros(n, np.uint8))[0]
    given = scipy.sparse.csr_array(fired)
    sparse = scipy.sparse.csr_array(
        (given.data != 0, given.indices, given.indptr), given.shape, copy=True
    )
    sparse.sum_duplicates()
    sparse.eliminate_zeros()
    return Pattern(sparse.indptr.astype(np.int64), sparse.indices.astype(index_type(n)))


def _dense(fired: Any, n: int) -> Tensor:
    """Any accepted form of firing -> dense bool (t, n)."""
    if isinstance(fired, Tensor) and fired.layout == torch.strided and fired.shape[1:] == (n,):
        return fired != 0
    return _from_pattern(_pattern(fired, n), n)


def _from_pattern(pattern: Pattern, n: int) -> Tensor:
    tokens = np.repeat(np.arange(len(pattern.indptr) - 1), np.diff(pattern.indptr))
    dense = torch.zeros(len(pattern.indptr) - 1, n, dtype=torch.bool)
    dense[torch.from_numpy(tokens), torch.from_numpy(pattern.indices.astype(np.int64))] = True
    return dense


def _joined(patterns: Sequence[Pattern]) -> Pattern:
    lengths = np.concatenate([np.diff(pattern.indptr) for pattern in patterns])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Pattern(indptr, np.concatenate([pattern.indices for pattern in patterns]))


# --------------------------------------------------------------------------- φ


@overload
def phi(n11: Tensor, n1_a: Any, n1_b: Any, n_tokens: int) -> Tensor: ...
@overload
def phi(n11: Array, n1_a: Any, n1_b: Any, n_tokens: int) -> Array: ...
def phi(n11: Any, n1_a: Any, n1_b: Any, n_tokens: int) -> Any:
    """φ of every pair (Eq. 1). n11: (n_a, n_b), n1_a: (n_a,), n1_b: (n_b,) integers.

    Returns float64 (n_a, n_b), a tensor for a tensor; nan where a marginal is 0 or n_tokens.
    """
    if isinstance(n11, Tensor):
        together, a, b = (torch.as_tensor(x).cpu().numpy() for x in (n11, n1_a, n1_b))
        return torch.from_numpy(phi(together, a, b, n_tokens)).to(n11.device)
    a, b = np.asarray(n1_a, np.float64), np.asarray(n1_b, np.float64)
    n = float(n_tokens)
    deviation_a, deviation_b = np.sqrt(a * (n - a)), np.sqrt(b * (n - b))
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = n * np.asarray(n11, np.float64) - np.outer(a, b)
        result = excess / np.outer(deviation_a, deviation_b)
    result[deviation_a == 0] = np.nan
    result[:, deviation_b == 0] = np.nan
    return result


def noise_floor(n_tokens: int) -> float:
    """Mean |φ| of independent features, about sqrt(2 / (π N)); less for rarely firing ones."""
    return math.sqrt(2 / (math.pi * n_tokens))


# --------------------------------------------------------------------------- summaries

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
N_GROUPS = 10  # of firing rate: deciles
N_BINS = 2**14  # of the histogram over [-1, 1]: 1.2e-4 wide
_FINE = 2**20  # bins in which quantiles are first located, then found exactly
_PARTS = 16  # rows are dealt to so many partial results: the sums do not depend on threads
_SMALL = 256  # factorials below are looked up, above Stirling's series is exact to 1e-15
_LOG_FACTORIALS = np.array([math.lgamma(x + 1) for x in range(_SMALL)])


@dataclass(frozen=True)
class PhiSummary:
    """φ over all pairs i < j of the features looked at, without any matrix of it.

    n_pairs: pairs with a defined φ; n_undefined: the others (a feature fires never or always).
    mean, mean_abs, std_abs (of |φ|), sum_sq (Σφ²), share_negative (φ < 0), maximum and its pair:
    over the defined pairs. quantiles: exact, interpolated as numpy's default.
    histogram: pairs in each of N_BINS equal bins between `edges`, from -1 to 1.
    null_mean_abs: mean |φ| expected of independent features that fire as often as these do.
    by_rate: pairs by the decile of firing rate of the rarer and the more frequent feature
    (columns group_a, group_b, rate_a, rate_b, n_pairs, mean_abs, null_mean_abs).
    mean_abs_by_feature, null_by_feature: (n,) mean over a feature's pairs; nan outside.
    """

    n_tokens: int
    n_pairs: int
    n_undefined: int
    mean: float
    mean_abs: float
    std_abs: float
    sum_sq: float
    quantiles: Mapping[float, float]
    share_negative: float
    maximum: float
    pair: tuple[int, int]
    edges: Array
    histogram: Array
    noise_floor: float
    null_mean_abs: float
    by_rate: pd.DataFrame
    mean_abs_by_feature: Array
    null_by_feature: Array
    l0: float

    @property
    def median(self) -> float:
        """Median φ."""
        return self.quantiles[0.5]

    @property
    def density(self) -> Array:
        """(N_BINS,) density of φ, per unit of φ."""
        return self.histogram / (self.n_pairs * np.diff(self.edges))

    def binned(self, per_decade: int = 12) -> pd.DataFrame:
        """The density in bins that widen away from zero, for a symmetric logarithmic axis.

        Columns: phi (bin centre), width, density. Bins are made of whole bins of `histogram`.
        """
        half = N_BINS // 2
        steps = np.unique(
            np.round(np.logspace(0, math.log10(half), int(per_decade * math.log10(half)) + 1))
        ).astype(int)
        cuts = np.concatenate([half - steps[::-1], [half], half + steps])
        sums = np.add.reduceat(self.histogram, cuts[:-1])
        edges = self.edges[cuts]
        width = np.diff(edges)
        return pd.DataFrame(
            {
                "phi": (edges[:-1] + edges[1:]) / 2,
                "width": width,
                "density": sums / (self.n_pairs * width),
            }
        )


@njit(cache=True)
def _log_factorial(x: int, small: Array) -> float:
    if x < len(small):
        return small[x]
    y = float(x)
    series = (1 / 12 - (1 / 360 - 1 / (1260 * y * y)) / (y * y)) / y
    return y * math.log(y) - y + 0.5 * math.log(2 * math.pi * y) + series


@njit(cache=True)
def _null_abs(a: int, b: int, n: int, log_ways: float, small: Array) -> float:
    """E |n N11 - a b| of independent features; see `null_mean_abs`."""
    m = a * b // n + 1
    rest = n - a - b + m
    log_p = (
        log_ways
        - _log_factorial(m, small)
        - _log_factorial(a - m, small)
        - _log_factorial(b - m, small)
        - _log_factorial(rest, small)
    )
    return 2.0 * m * rest * math.exp(log_p)


@njit(parallel=True, cache=True)
def _summarise(
    n11: Array,
    index: Array,
    n1: Array,
    n: int,
    log_ways: Array,
    small: Array,
    group: Array,
    fine: Array,
    sums: Array,
    pairs: Array,
    largest: Array,
    by_feature: Array,
    by_group: Array,
) -> None:
    half = fine.shape[1] // 2
    log_n = _log_factorial(n, small)
    for part in prange(fine.shape[0]):
        for u in range(part, len(index), fine.shape[0]):
            i, a = index[u], n1[u]
            deviation = math.sqrt(float(a) * float(n - a))
            total, total_abs, total_sq, total_null, negative = 0.0, 0.0, 0.0, 0.0, 0
            for v in range(u + 1, len(index)):
                b = n1[v]
                scale = deviation * math.sqrt(float(b) * float(n - b))
                value = (float(n) * n11[i, index[v]] - float(a) * float(b)) / scale
                null = _null_abs(a, b, n, log_ways[u] + log_ways[v] - log_n, small) / scale
                size = abs(value)
                total += value
                total_abs += size
                total_sq += value * value
                total_null += null
                negative += value < 0
                bin_ = min(max(int((value + 1) * half), 0), 2 * half - 1)
                fine[part, bin_] += 1
                if value > largest[part, 0]:
                    largest[part, 0], largest[part, 1], largest[part, 2] = value, u, v
                by_feature[part, 0, v] += size
                by_feature[part, 1, v] += null
                by_group[part, 0, group[u], group[v]] += size
                by_group[part, 1, group[u], group[v]] += null
                by_group[part, 2, group[u], group[v]] += 1
            by_feature[part, 0, u] += total_abs
            by_feature[part, 1, u] += total_null
            sums[u, 0], sums[u, 1], sums[u, 2], sums[u, 3] = total, total_abs, total_sq, total_null
            pairs[u] = negative


@njit(parallel=True, cache=True)
def _collect(
    n11: Array, index: Array, n1: Array, n: int, wanted: Array, begin: Array, found: Array
) -> None:
    """Write the φ of all pairs in the wanted fine bins, each part from its own place on."""
    half = len(wanted) // 2
    for part in prange(len(begin)):
        p = begin[part]
        for u in range(part, len(index), len(begin)):
            i, a = index[u], n1[u]
            deviation = math.sqrt(float(a) * float(n - a))
            for v in range(u + 1, len(index)):
                b = n1[v]
                scale = deviation * math.sqrt(float(b) * float(n - b))
                value = (float(n) * n11[i, index[v]] - float(a) * float(b)) / scale
                if wanted[min(max(int((value + 1) * half), 0), 2 * half - 1)]:
                    found[p] = value
                    p += 1


def summarise(
    counts: Counts, features: Array | None = None, quantiles: Sequence[float] = QUANTILES
) -> PhiSummary:
    """φ over all pairs of a scan, in two passes over the counts.

    features: (n,) bool or indices, the features to look at (all by default). Memory beyond the
    counts: about 0.2 GB, and 8 bytes for each pair that shares a fine bin with a quantile.
    Raises MeasureError if fewer than two of the features are alive.
    """
    n = counts.n_tokens
    chosen = np.arange(len(counts.n1))
    chosen = chosen if features is None else chosen[np.asarray(features)]
    index = np.sort(chosen[counts.alive[chosen]])
    if len(index) < 2:
        raise MeasureError(
            f"{len(index)} of {len(chosen)} features have a defined φ on {n} tokens: "
            f"scan more tokens or train longer"
        )
    n1 = counts.n1[index].astype(np.int64)
    group = np.empty(len(index), np.int64)
    group[np.argsort(n1, kind="stable")] = np.arange(len(index)) * N_GROUPS // len(index)
    log_ways = np.array([_log_choices(a, n) for a in n1])
    fine = np.zeros((_PARTS, _FINE), np.int64)
    sums, negative = np.zeros((len(index), 4)), np.zeros(len(index), np.int64)
    largest = np.tile([-np.inf, 0.0, 0.0], (_PARTS, 1))
    by_feature = np.zeros((_PARTS, 2, len(index)))
    by_group = np.zeros((_PARTS, 3, N_GROUPS, N_GROUPS))
    _summarise(
        counts.n11, index, n1, n, log_ways, _LOG_FACTORIALS, group,
        fine, sums, negative, largest, by_feature, by_group,
    )  # fmt: skip
    n_pairs = len(index) * (len(index) - 1) // 2
    total, total_abs, total_sq, total_null = (math.fsum(column) for column in sums.T)
    mean_abs = total_abs / n_pairs
    top = largest[np.lexsort((largest[:, 2], largest[:, 1], -largest[:, 0]))[0]]
    per_feature = np.full((2, len(counts.n1)), np.nan)
    per_feature[:, index] = by_feature.sum(axis=0) / (len(index) - 1)
    found = _quantiles(counts.n11, index, n1, n, fine, quantiles)
    return PhiSummary(
        n_tokens=n,
        n_pairs=n_pairs,
        n_undefined=len(chosen) * (len(chosen) - 1) // 2 - n_pairs,
        mean=total / n_pairs,
        mean_abs=mean_abs,
        std_abs=math.sqrt(max(total_sq / n_pairs - mean_abs**2, 0.0)),
        sum_sq=total_sq,
        quantiles=found,
        share_negative=int(negative.sum()) / n_pairs,
        maximum=float(top[0]),
        pair=(int(index[int(top[1])]), int(index[int(top[2])])),
        edges=np.linspace(-1, 1, N_BINS + 1),
        histogram=fine.sum(axis=0).reshape(N_BINS, -1).sum(axis=1),
        noise_floor=noise_floor(n),
        null_mean_abs=total_null / n_pairs,
        by_rate=_rate_table(by_group.sum(axis=0), n1 / n, group),
        mean_abs_by_feature=per_feature[0],
        null_by_feature=per_feature[1],
        l0=counts.l0,
    )


def _quantiles(
    n11: Array, index: Array, n1: Array, n: int, fine: Array, quantiles: Sequence[float]
) -> dict[float, float]:
    """Exact order statistics: only the pairs of the bins that hold one are looked at again."""
    upto = np.cumsum(fine.sum(axis=0))
    places = [(int(upto[-1]) - 1) * q for q in quantiles]
    ranks = np.unique([r for place in places for r in (math.floor(place), math.ceil(place))])
    bins = np.searchsorted(upto, ranks, side="right")
    wanted = np.zeros(_FINE, np.bool_)
    wanted[bins] = True
    sizes = fine[:, wanted].sum(axis=1)
    values = np.empty(int(sizes.sum()))
    _collect(n11, index, n1, n, wanted, np.cumsum(sizes) - sizes, values)
    values.sort()
    kept = np.cumsum(np.where(wanted, fine.sum(axis=0), 0))
    skipped = upto - kept  # pairs below each bin that were not collected
    at = {int(rank): values[rank - skipped[bin_]] for rank, bin_ in zip(ranks, bins, strict=True)}
    return {
        q: float(
            at[math.floor(place)]
            + (place - math.floor(place)) * (at[math.ceil(place)] - at[math.floor(place)])
        )
        for q, place in zip(quantiles, places, strict=True)
    }


def _rate_table(by_group: Array, rates: Array, group: Array) -> pd.DataFrame:
    total_abs, total_null, pairs = (table + np.triu(table.T, 1) for table in by_group)
    rate = [rates[group == g].mean() if (group == g).any() else np.nan for g in range(N_GROUPS)]
    rows = [
        (a, b, rate[a], rate[b], int(pairs[a, b]),
         total_abs[a, b] / pairs[a, b], total_null[a, b] / pairs[a, b])
        for a in range(N_GROUPS) for b in range(a, N_GROUPS) if pairs[a, b]
    ]  # fmt: skip
    columns = ["group_a", "group_b", "rate_a", "rate_b", "n_pairs", "mean_abs", "null_mean_abs"]
    return pd.DataFrame(rows, columns=columns)


def abs_phi_blocks(
    counts: Counts, features: Array | None = None, rows: int = 1024
) -> Iterator[tuple[slice, Array]]:
    """|φ| among the alive features of a scan, in blocks of rows: (rows, (r, m) float32).

    The diagonal is zero. m: alive features (of `features`, indices or bool), in ascending order.
    For `statistics.bootstrap_mean_abs`.
    """
    chosen = np.arange(len(counts.n1))
    chosen = chosen if features is None else chosen[np.asarray(features)]
    index = np.sort(chosen[counts.alive[chosen]])
    n1 = counts.n1[index]
    for first in range(0, len(index), rows):
        part = slice(first, min(first + rows, len(index)))
        block = np.abs(
            phi(counts.n11[index[part]][:, index], n1[part], n1, counts.n_tokens)
        ).astype(np.float32)
        block[np.arange(len(block)), np.arange(part.start, part.stop)] = 0
        yield part, block


# --------------------------------------------------------------------------- chance


def null_mean_abs(n1_a: int, n1_b: int, n_tokens: int) -> float:
    """E|φ| of two independent features that fire on n1_a and n1_b of n_tokens tokens.

    With the marginals fixed, N11 is hypergeometric with mean μ = n1_a n1_b / n. Its mean absolute
    deviation is closed: with p its probability function, g(x) = x (n - n1_a - n1_b + x) p(x) / n
    satisfies g(x) - g(x+1) = (x - μ) p(x), so the sum over x > μ telescopes to g(m) with
    m = ⌊μ⌋ + 1, and E|N11 - μ| = 2 g(m). This is the exact expectation of shuffling the tokens of
    each feature. For large μ it tends to √(2 / (π n)), the noise floor; for rare features it is
    about 2 √(n1_a n1_b) / n, far below it. Relative error about 1e-7 at 10^7 tokens.
    """
    a, b, n = int(n1_a), int(n1_b), int(n_tokens)
    if not (0 < a < n and 0 < b < n):
        return math.nan
    log_ways = _log_choices(a, n) + _log_choices(b, n) - math.lgamma(n + 1)
    scale = math.sqrt(a * (n - a)) * math.sqrt(b * (n - b))
    return float(_null_abs(a, b, n, log_ways, _LOG_FACTORIALS)) / scale


def _log_choices(a: int, n: int) -> float:
    """log a! (n - a)!"""
    return float(
        _log_factorial(int(a), _LOG_FACTORIALS) + _log_factorial(int(n - a), _LOG_FACTORIALS)
    )


def shuffled_mean_abs(n1: Array, n_tokens: int, n_shuffles: int = 10, seed: int = 0) -> Array:
    """mean |φ| over pairs after shuffling the tokens of each feature, by simulation.

    n1: (n,) firing counts. Returns (n_shuffles,). The simulated check on the closed form
    (`PhiSummary.null_mean_abs`); meant for some hundreds of features at a time.
    """
    generator = np.random.default_rng(seed)
    result = np.empty(n_shuffles)
    for shuffle in range(n_shuffles):
        counter = CooccurrenceCounter(len(n1))
        columns = [
            np.sort(generator.choice(n_tokens, size=int(count), replace=False)) for count in n1
        ]
        pointer = np.concatenate([np.zeros(1, np.int64), np.cumsum(n1, dtype=np.int64)])
        fired = scipy.sparse.csc_array(
            (np.ones(pointer[-1], bool), np.concatenate(columns), pointer), (n_tokens, len(n1))
        )
        counter.update(fired.tocsr())
        result[shuffle] = summarise(counter.counts()).mean_abs
    return result


def enough_tokens(summary: PhiSummary, change: float = 0.05) -> str:
    """Whether the scan is long enough to see a relative change of mean |φ|, as one sentence.

    A change is drowned once it is smaller than the noise floor √(2/(πN)).
    """
    wanted = change * summary.mean_abs
    needed = math.ceil(2 / (math.pi * wanted**2))
    what = f"{100 * change:g}% of mean |φ| ({wanted:.1e})"
    floor = f"With {summary.n_tokens:,} tokens the noise floor {summary.noise_floor:.1e}"
    if summary.noise_floor <= wanted:
        return f"{floor} lies below {what}: a change of that size stands out from chance."
    return (
        f"{floor} exceeds {what}, so chance co-firing alone is larger than a change of that size: "
        f"about {needed:,} tokens would be needed; until then only differences beyond those "
        f"between seeds count (independent features of these rates would give "
        f"{summary.null_mean_abs:.1e})."
    )


# --------------------------------------------------------------------------- scans of a run

SCALES = (0.9, 0.95, 1.05, 1.1)  # of every threshold, for the elasticity of mean |φ|
SENSITIVITY_FEATURES = 512  # features whose pairs are counted under other thresholds as well
_TOKENS = 8192  # scanned at once


def scan_arms(run: Run, arms: Mapping[str, Arm]) -> dict[str, Counts]:
    """Count co-firing above the thresholds for every arm, in one pass over the scan role.

    Thresholds are calibrated if they are not yet. Counts are artefacts, one an arm: what is there
    is read, only what is missing is counted. A killed scan goes on from its last checkpoint and
    ends with the same integers. Returns counts by arm name, with n11 memory-mapped.
    """
    calibrations = calibrate_arms(run, arms)
    residuals = Residuals(run, "scan")
    inputs = scan_inputs(run, residuals)
    artefacts = {name: counts_artefact(run, arm, inputs) for name, arm in arms.items()}
    with locked(artefacts.values()):
        missing = [name for name, artefact in artefacts.items() if not artefact.complete]
        if missing:
            scans = [
                _Scan(run, arms[name], calibrations[name], artefacts[name]) for name in missing
            ]
            _scan(run, residuals, scans)
        return {name: load_counts(artefact, "n11") for name, artefact in artefacts.items()}


def counts_artefact(run: Run, arm: Arm, inputs: Mapping[str, Any]) -> Artefact:
    """Where the counts of an arm are kept. inputs: of :func:`scan_inputs`."""
    return run.artefact("counts", {"arm": arm.folder.name, **inputs}, VERSION)


class _Scan:
    """The counting of one arm: at its thresholds, and for some features at others as well."""

    def __init__(self, run: Run, arm: Arm, calibration: Calibration, artefact: Artefact) -> None:
        self.sae, self.artefact = arm.sae, artefact
        self.device = arm.sae.b_dec.device
        n = arm.sae.n_features
        rule = run.profile.evaluation.threshold_rule
        base = calibration.threshold(rule).numpy()
        self.features = sensitivity_features(n)
        self.thresholds = {"base": base, **{f"scale-{s:g}": base * np.float32(s) for s in SCALES}}
        for other, theta in calibration.thresholds.items():
            if other != rule:
                self.thresholds[f"rule-{other}"] = theta.numpy()
        self.lowest = np.minimum.reduce(list(self.thresholds.values()))
        self.renumber = np.full(n, -1)
        self.renumber[self.features] = np.arange(len(self.features))
        self.counter = CooccurrenceCounter(n, device=self.device)
        self.others = {
            name: CooccurrenceCounter(len(self.features), device=self.device)
            for name in self.thresholds
        }
        self.fired = dict.fromkeys(self.thresholds, 0)
        self.next_chunk, self.seconds = 0, 0.0
        if self.partial.exists():
            with np.load(self.partial) as state:
                self._restore(state)

    @property
    def partial(self) -> Any:
        """The checkpoint's path."""
        return self.artefact.folder / "partial.npz"

    def add(self, pre: Tensor) -> None:
        """Add the pre-activations (t, n) of some tokens."""
        if self.device.type == "cpu":
            pattern, values = above(pre.numpy(), self.lowest)
            whole = np.arange(len(self.renumber))
            self.counter.update(restrict(pattern, values, self.thresholds["base"], whole))
            for name, theta in self.thresholds.items():
                self.fired[name] += int((values > theta[pattern.indices]).sum())
                self.others[name].update(restrict(pattern, values, theta, self.renumber))
            return
        for name, theta in self.thresholds.items():
            fires = pre > torch.from_numpy(theta).to(pre.device)
            self.fired[name] += int(fires.sum())
            self.others[name].update(fires[:, torch.from_numpy(self.features).to(pre.device)])
            if name == "base":
                self.counter.update(fires)

    def checkpoint(self) -> None:
        """Write everything that a later process needs to go on."""
        state = {f"counter/{key}": array for key, array in self.counter.state().items()}
        for name, counter in self.others.items():
            state |= {f"{name}/{key}": array for key, array in counter.state().items()}
        progress_made = [self.next_chunk, self.seconds, *self.fired.values()]
        with atomic_write(self.partial) as path:
            np.savez(path, made=np.array(progress_made), **state)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Write the artefact."""
        for name, counter in {"n11": self.counter, **self.others}.items():
            counts = counter.counts()
            for suffix, array in (("", counts.n11), ("-n1", counts.n1)):
                with atomic_write(self.artefact.folder / f"{name}{suffix}.npy") as path:
                    np.save(path, array)
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


def sensitivity_features(n_features: int) -> Array:
    """The features, evenly spread, whose pairs are also counted under other thresholds."""
    n = min(n_features, SENSITIVITY_FEATURES)
    return np.arange(n) * n_features // n


def _scan(run: Run, residuals: Residuals, scans: Sequence[_Scan]) -> None:
    dtype = product_dtype(run)
    first = min(scan.next_chunk for scan in scans)
    saved = time.monotonic()
    with progress(residuals.n_tokens, f"scanning {len(scans)} arms") as bar:
        for i in range(first, residuals.n_chunks):
            chunk = residuals.chunk(i)
            started = time.monotonic()
            for x in chunk.split(_TOKENS):
                z = normalise(x.float())[0]
                for scan in scans:
                    if scan.next_chunk == i:
                        scan.add(pre_activations(scan.sae, z, dtype))
                bar.update(len(x))
            for scan in scans:
                if scan.next_chunk == i:
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


def load_counts(artefact: Artefact, name: str) -> Counts:
    """Counts of a scan's artefact: `n11`, or one of those under other thresholds."""
    info = artefact.info
    return Counts(
        np.load(artefact.folder / f"{name}.npy", mmap_mode="r"),
        np.load(artefact.folder / f"{name}-n1.npy"),
        info["n_tokens"],
    )


# --------------------------------------------------------------------------- across dictionaries


def check_comparable(arm_a: Arm, arm_b: Arm) -> None:
    """Refuse two arms whose dictionaries read different residuals, and say what differs."""
    about = []
    for arm in (arm_a, arm_b):
        config = json.loads((arm.folder / "sae" / "cfg.json").read_text(encoding="utf-8"))
        metadata = config.get("metadata", {})
        about.append(
            {
                "language model": metadata.get("model_name"),
                "hook": metadata.get("hook_name"),
                "normalisation": config.get("normalize_activations"),
                "d_in": arm.sae.d_in,
            }
        )
    for what, value in about[0].items():
        if value != about[1][what]:
            raise MeasureError(
                f"{arm_a.spec.name} and {arm_b.spec.name} cannot be compared: their {what} is "
                f"{value} and {about[1][what]}; take two dictionaries of the same residuals"
            )


def cross_counts(run: Run, arm_a: Arm, arm_b: Arm) -> CrossCounts:
    """Counts between the features of two arms over the scan role, as an artefact.

    Raises MeasureError if the two were not trained on the same kind of residuals.
    """
    pair = arm_a.spec.name, arm_b.spec.name
    return cross_scan(run, {arm.spec.name: arm for arm in (arm_a, arm_b)}, [pair])[pair]


def cross_scan(
    run: Run, arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], CrossCounts]:
    """`cross_counts` for several pairs of arm names, all in one pass over the scan role."""
    for a, b in pairs:
        check_comparable(arms[a], arms[b])
    names = dict.fromkeys(name for pair in pairs for name in pair)
    calibrate_arms(run, {name: arms[name] for name in names})
    residuals = Residuals(run, "scan")
    inputs = scan_inputs(run, residuals)
    artefacts = {
        (a, b): run.artefact(
            "cross-counts",
            {"a": arms[a].folder.name, "b": arms[b].folder.name, **inputs},
            VERSION,
        )
        for a, b in pairs
    }
    with locked(artefacts.values()):
        missing = [pair for pair, artefact in artefacts.items() if not artefact.complete]
        if missing:
            for pair, cross in _cross(run, residuals, arms, missing).items():
                folder = artefacts[pair].folder
                with atomic_write(folder / "n11.npy") as path:
                    np.save(path, cross.n11)
                with atomic_write(folder / "n1.npz") as path:
                    np.savez(path, a=cross.n1_a, b=cross.n1_b)
                artefacts[pair].finish({"n_tokens": cross.n_tokens}, shared_by=len(missing))
        return {pair: _load_cross(artefact) for pair, artefact in artefacts.items()}


def _cross(
    run: Run,
    residuals: Residuals,
    arms: Mapping[str, Arm],
    pairs: Sequence[tuple[str, str]],
) -> dict[tuple[str, str], CrossCounts]:
    dtype, device = product_dtype(run), residuals.device
    used = {name: arms[name].sae for name in dict.fromkeys(n for pair in pairs for n in pair)}
    counters = {
        (a, b): CooccurrenceCounter(used[a].n_features, used[b].n_features, device)
        for a, b in pairs
    }
    with progress(residuals.n_tokens, f"cross counts of {len(pairs)} pairs of arms") as bar:
        for i in range(residuals.n_chunks):
            for x in residuals.chunk(i).split(_TOKENS):
                z = normalise(x.float())[0]
                fired = {
                    name: firing(pre_activations(sae, z, dtype), sae.threshold)
                    for name, sae in used.items()
                }
                for (a, b), counter in counters.items():
                    counter.update(fired[a], fired[b])
                bar.update(len(x))
    return {pair: counter.cross_counts() for pair, counter in counters.items()}


def firing(pre: Tensor, threshold: Tensor | None) -> Any:
    """What exceeds the thresholds: a pattern on the CPU, a bool matrix on a GPU."""
    assert threshold is not None
    if pre.device.type == "cpu":
        return above(pre.numpy(), threshold.numpy())[0]
    return pre > threshold


def _load_cross(artefact: Artefact) -> CrossCounts:
    n_tokens = artefact.info["n_tokens"]
    with np.load(artefact.folder / "n1.npz") as n1:
        n11 = np.load(artefact.folder / "n11.npy", mmap_mode="r")
        return CrossCounts(n11, n1["a"], n1["b"], n_tokens)


def top_matches(cross: CrossCounts, m: int = 5, of: str = "a") -> pd.DataFrame:
    """The m features of the other dictionary with the largest |φ|, for every feature of one.

    of: "a" or "b", the dictionary whose features are looked up. Columns: feature, rank (from 0),
    match, phi. Ties go to the lower feature; features without a defined φ are left out.
    """
    if of not in ("a", "b"):
        raise MeasureError(f"of is '{of}': give 'a' or 'b'")
    n11, n1, n1_other = cross.n11, cross.n1_a, cross.n1_b
    if of == "b":
        n11, n1, n1_other = n11.T, n1_other, n1
    m = min(m, len(n1_other))
    parts = []
    for row in range(0, len(n1), 512):
        rows = slice(row, row + 512)
        values = phi(np.asarray(n11[rows]), n1[rows], n1_other, cross.n_tokens)
        size = np.nan_to_num(np.abs(values), nan=-1.0)
        # A stable sort of the few that reach the m-th largest keeps ties in order.
        cut = -np.partition(-size, m - 1, axis=1)[:, m - 1 : m]
        feature, match = np.nonzero((size >= cut) & (size >= 0))
        order = np.lexsort((match, -size[feature, match], feature))
        feature, match = feature[order], match[order]
        rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
        keep = rank < m
        parts.append(
            pd.DataFrame(
                {
                    "feature": feature[keep] + row,
                    "rank": rank[keep],
                    "match": match[keep],
                    "phi": values[feature[keep], match[keep]],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def partners(crosses: Mapping[tuple[str, str], CrossCounts], m: int = 3) -> pd.DataFrame:
    """:func:`top_matches` of several pairs (a, b) of arms, in both directions.

    Columns besides: a, b, of (whose features are looked up).
    """
    return pd.concat(
        [
            top_matches(cross, m, of).assign(a=a, b=b, of=of)
            for (a, b), cross in crosses.items()
            for of in ("a", "b")
        ],
        ignore_index=True,
    )
