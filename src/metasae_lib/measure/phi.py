"""The φ coefficient over all pairs, and what chance alone gives.

    φ(i,j) = (N N11 - N1i N1j) / sqrt(N1i (N - N1i) N1j (N - N1j))                  (Eq. 1)

with N tokens, N11 tokens on which both features fire, N1 those on which one does. φ is float64,
undefined (nan) for a feature that fires never or always; undefined pairs are counted, not zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.measure.counting import Counts
from metasae_lib.measure.patterns import Array
from metasae_lib.study import MeasureError

N11 = TypeVar("N11", Tensor, Array)


def phi(n11: N11, n1_a: Any, n1_b: Any, n_tokens: int) -> N11:
    """φ of every pair (Eq. 1). n11: (n_a, n_b), n1_a: (n_a,), n1_b: (n_b,) integers.

    Returns float64 (n_a, n_b), a tensor for a tensor; nan where a marginal is 0 or n_tokens.
    Raises MeasureError for shapes that do not fit, and for marginals of another scan.
    """
    if isinstance(n11, Tensor):
        together, one, other = (torch.as_tensor(x).cpu().numpy() for x in (n11, n1_a, n1_b))
        return torch.from_numpy(phi(together, one, other, n_tokens)).to(n11.device)
    a: Array = np.asarray(n1_a, np.float64)
    b: Array = np.asarray(n1_b, np.float64)
    n = float(n_tokens)
    if a.ndim != 1 or b.ndim != 1 or np.shape(n11) != (*a.shape, *b.shape):
        raise MeasureError(
            f"n11 is {np.shape(n11)} with n1_a {a.shape} and n1_b {b.shape}: give (n_a, n_b) with "
            f"(n_a,) and (n_b,)"
        )
    if not all(((n1 >= 0) & (n1 <= n)).all() for n1 in (a, b)):
        raise MeasureError(f"n1_a and n1_b must lie between 0 and n_tokens, {n_tokens}")
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


QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
N_GROUPS = 10  # of firing rate: deciles
N_BINS = 2**14  # of the histogram over [-1, 1]: 1.2e-4 wide
_FINE = 2**20  # bins in which quantiles are first located, then found exactly
BLOCK_ENTRIES = 2**18  # φ made at once where a matrix of it is looked at: its parts fit the cache
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
    l0: float

    @property
    def median(self) -> float:
        """Median φ."""
        return self.quantiles[0.5]

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
        centre, density = (edges[:-1] + edges[1:]) / 2, sums / (self.n_pairs * width)
        return pd.DataFrame({"phi": centre, "width": width, "density": density})


@njit(cache=True)
def log_factorial(x: int) -> float:
    if x < _SMALL:
        return _LOG_FACTORIALS[x]
    y = float(x)
    series = (1 / 12 - (1 / 360 - 1 / (1260 * y * y)) / (y * y)) / y
    return y * math.log(y) - y + 0.5 * math.log(2 * math.pi * y) + series


@njit(cache=True)
def log_choices(a: int, n: int) -> float:
    """log a! (n - a)!"""
    return log_factorial(a) + log_factorial(n - a)


@njit(cache=True)
def null_abs(a: int, b: int, n: int, log_ways: float) -> float:
    """E |n N11 - a b| of independent features; see `null_mean_abs`."""
    m = a * b // n + 1
    rest = n - a - b + m
    log_p = log_ways - log_factorial(m) - log_factorial(a - m)
    log_p = log_p - log_factorial(b - m) - log_factorial(rest)
    return 2.0 * m * rest * math.exp(log_p)


@njit(cache=True)
def pair_phi(together: int, a: int, b: int, n: int) -> tuple[float, float]:
    """φ of one pair, and its denominator."""
    scale = math.sqrt(float(a) * float(n - a)) * math.sqrt(float(b) * float(n - b))
    return (float(n) * together - float(a) * float(b)) / scale, scale


@njit(cache=True)
def _fine_bin(value: float) -> int:
    return min(max(int((value + 1) * (_FINE // 2)), 0), _FINE - 1)


@njit(parallel=True, cache=True)
def _summarise(
    n11: Array, index: Array, n1: Array, n: int, group: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """What `summarise` adds up: over the pairs of each first feature, or of each part of them."""
    m = len(index)
    sums, negative = np.zeros((m, 4)), np.zeros(m, np.int64)
    fine = np.zeros((_PARTS, _FINE), np.int64)
    largest = np.zeros((_PARTS, 3))
    largest[:, 0] = -np.inf
    by_group = np.zeros((_PARTS, 3, N_GROUPS, N_GROUPS))
    log_ways = np.array([log_choices(a, n) for a in n1])
    log_n = log_factorial(n)
    for part in prange(_PARTS):
        for u in range(part, m, _PARTS):
            i, a = index[u], n1[u]
            total, total_abs, total_sq, total_null = 0.0, 0.0, 0.0, 0.0
            for v in range(u + 1, m):
                value, scale = pair_phi(n11[i, index[v]], a, n1[v], n)
                null = null_abs(a, n1[v], n, log_ways[u] + log_ways[v] - log_n) / scale
                size = abs(value)
                total += value
                total_abs += size
                total_sq += value * value
                total_null += null
                negative[u] += value < 0
                fine[part, _fine_bin(value)] += 1
                if value > largest[part, 0]:
                    largest[part, 0], largest[part, 1], largest[part, 2] = value, u, v
                by_group[part, 0, group[u], group[v]] += size
                by_group[part, 1, group[u], group[v]] += null
                by_group[part, 2, group[u], group[v]] += 1
            sums[u, 0], sums[u, 1], sums[u, 2], sums[u, 3] = total, total_abs, total_sq, total_null
    return sums, negative, fine, largest, by_group


@njit(parallel=True, cache=True)
def _collect(
    n11: Array, index: Array, n1: Array, n: int, wanted: Array, begin: Array, found: Array
) -> None:
    """Write the φ of all pairs in the wanted fine bins, each part from its own place on."""
    for part in prange(_PARTS):
        p = begin[part]
        for u in range(part, len(index), _PARTS):
            i, a = index[u], n1[u]
            for v in range(u + 1, len(index)):
                value, _ = pair_phi(n11[i, index[v]], a, n1[v], n)
                if wanted[_fine_bin(value)]:
                    found[p] = value
                    p += 1


def _defined(counts: Counts, features: Array | None) -> tuple[Array, Array]:
    """Indices of the features looked at, and those of them whose φ is defined, ascending."""
    chosen = np.arange(len(counts.n1))
    chosen = chosen if features is None else chosen[np.asarray(features)]
    return chosen, np.sort(chosen[counts.alive[chosen]])


def summarise(
    counts: Counts, features: Array | None = None, quantiles: Sequence[float] = QUANTILES
) -> PhiSummary:
    """φ over all pairs of a scan, in two passes over the counts.

    features: (n,) bool or indices, the features to look at (all by default). Memory beyond the
    counts: about 0.2 GB, and 8 bytes for each pair that shares a fine bin with a quantile.
    Raises MeasureError if fewer than two of the features are alive.
    """
    n = counts.n_tokens
    chosen, index = _defined(counts, features)
    if len(index) < 2:
        raise MeasureError(
            f"{len(index)} of {len(chosen)} features have a defined φ on {n} tokens: "
            f"scan more tokens or train longer"
        )
    n1 = counts.n1[index].astype(np.int64)
    group = np.empty(len(index), np.int64)
    group[np.argsort(n1, kind="stable")] = np.arange(len(index)) * N_GROUPS // len(index)
    sums, negative, fine, largest, by_group = _summarise(counts.n11, index, n1, n, group)
    n_pairs = len(index) * (len(index) - 1) // 2
    total, total_abs, total_sq, total_null = (math.fsum(column) for column in sums.T)
    mean_abs = total_abs / n_pairs
    top = largest[np.lexsort((largest[:, 2], largest[:, 1], -largest[:, 0]))[0]]
    return PhiSummary(
        n_tokens=n,
        n_pairs=n_pairs,
        n_undefined=len(chosen) * (len(chosen) - 1) // 2 - n_pairs,
        mean=total / n_pairs,
        mean_abs=mean_abs,
        std_abs=math.sqrt(max(total_sq / n_pairs - mean_abs**2, 0.0)),
        sum_sq=total_sq,
        quantiles=_quantiles(counts.n11, index, n1, n, fine, quantiles),
        share_negative=int(negative.sum()) / n_pairs,
        maximum=float(top[0]),
        pair=(int(index[int(top[1])]), int(index[int(top[2])])),
        edges=np.linspace(-1, 1, N_BINS + 1),
        histogram=fine.sum(axis=0).reshape(N_BINS, -1).sum(axis=1),
        noise_floor=noise_floor(n),
        null_mean_abs=total_null / n_pairs,
        by_rate=_rate_table(by_group.sum(axis=0), n1 / n, group),
        l0=counts.l0,
    )


def _quantiles(
    n11: Array, index: Array, n1: Array, n: int, fine: Array, quantiles: Sequence[float]
) -> dict[float, float]:
    """Exact order statistics: only the pairs of the bins that hold one are looked at again."""
    upto = np.cumsum(fine.sum(axis=0))
    places = (int(upto[-1]) - 1) * np.array(quantiles)
    ranks = np.array([np.floor(places), np.ceil(places)]).astype(np.int64)
    bins = np.searchsorted(upto, ranks, side="right")
    wanted = np.zeros(_FINE, np.bool_)
    wanted[bins] = True
    sizes = fine[:, wanted].sum(axis=1)
    values = np.empty(int(sizes.sum()))
    _collect(n11, index, n1, n, wanted, np.cumsum(sizes) - sizes, values)
    values.sort()
    kept = np.cumsum(np.where(wanted, fine.sum(axis=0), 0))
    skipped = upto - kept  # pairs below each bin that were not collected
    low, high = values[ranks - skipped[bins]]
    found = low + (places - ranks[0]) * (high - low)
    return dict(zip(quantiles, found.tolist(), strict=True))


def _rate_table(by_group: Array, rates: Array, group: Array) -> pd.DataFrame:
    total_abs, total_null, pairs = (table + np.triu(table.T, 1) for table in by_group)
    members = [rates[group == g] for g in range(N_GROUPS)]
    rate = np.array([each.mean() if len(each) else np.nan for each in members])
    a, b = np.nonzero(np.triu(pairs))
    return pd.DataFrame(
        {
            "group_a": a,
            "group_b": b,
            "rate_a": rate[a],
            "rate_b": rate[b],
            "n_pairs": pairs[a, b].astype(np.int64),
            "mean_abs": total_abs[a, b] / pairs[a, b],
            "null_mean_abs": total_null[a, b] / pairs[a, b],
        }
    )


def abs_phi_blocks(counts: Counts, features: Array | None = None) -> Iterator[tuple[slice, Array]]:
    """|φ| among the alive features of a scan, in blocks of rows: (rows, (r, m) float32).

    The diagonal is zero. m: alive features (of `features`, indices or bool), in ascending order.
    For `statistics.bootstrap_mean_abs`.
    """
    _, index = _defined(counts, features)
    n1 = counts.n1[index]
    rows = max(1, BLOCK_ENTRIES // max(1, len(index)))
    for first in range(0, len(index), rows):
        part = slice(first, min(first + rows, len(index)))
        block = np.abs(
            phi(counts.n11[index[part]][:, index], n1[part], n1, counts.n_tokens)
        ).astype(np.float32)
        block[np.arange(len(block)), np.arange(part.start, part.stop)] = 0
        yield part, block


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
    log_ways = log_choices(a, n) + log_choices(b, n) - math.lgamma(n + 1)
    scale = math.sqrt(a * (n - a)) * math.sqrt(b * (n - b))
    return float(null_abs(a, b, n, log_ways)) / scale


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
