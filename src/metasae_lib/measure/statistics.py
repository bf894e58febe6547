"""Intervals, tests and effect sizes: over features, over seeds, and over pairs as the paper has it.

Nothing here knows of models or runs: arrays in, small results out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from metasae_lib.study import MeasureError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A difference with its interval. `low` and `high` are nan where the data allow none."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class TTest:
    """A t test: statistic, degrees of freedom, two-sided p, and Cohen's d."""

    difference: float
    t: float
    df: float
    p: float
    d: float


def bootstrap_mean_abs(
    blocks: Iterable[tuple[slice, NDArray[np.float32]]], n_resamples: int = 200, seed: int = 0
) -> Floats:
    """mean |φ| in resamples of the features, (n_resamples,).

    The n (n-1) / 2 pairs hang together through n features, so features are drawn, not pairs: with
    w_i the times that feature i is drawn, a resample has the mean

        Σ_{i<j} w_i w_j |φ_ij| / Σ_{i<j} w_i w_j,

    a pair of a feature with its own copy left out. blocks: the (n, n) matrix of |φ| by blocks of
    rows with a zero diagonal (`phi.abs_phi_blocks`), float32: each mean is right to about
    1e-6 of itself. Cost: n² n_resamples multiply-adds.
    """
    weights = np.empty((0, n_resamples), np.float32)
    total = np.zeros(n_resamples)
    for rows, block in blocks:
        n = block.shape[1]
        if len(weights) != n:
            drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
            weights = drawn.T.astype(np.float32)
        total += np.einsum("ir,ir->r", weights[rows], block @ weights, dtype=np.float64)
    if len(weights) < 2 or n_resamples < 1:
        raise MeasureError("a bootstrap over features needs two features and one resample")
    exact = weights.astype(np.float64)
    return total / (exact.sum(axis=0) ** 2 - (exact**2).sum(axis=0))


def feature_difference(
    difference: float, replicates_a: Floats, replicates_b: Floats, level: float = 0.95
) -> Effect:
    """Interval of mean |φ| of b minus that of a, by the bootstraps over each one's features.

    difference: the observed one, b - a. The interval is difference ± z times the standard
    deviation of the replicates' differences: percentiles would be shifted, since copies of a
    feature thin a resample out. The two are drawn independently, which is wide rather than narrow
    for dictionaries with matching features. It says what other features of the same two trainings
    would give; other trainings (seeds) are another question, see `seed_difference`.
    """
    spread = float(np.std(replicates_b - replicates_a, ddof=1))
    reach = float(scipy.stats.norm.ppf((1 + level) / 2)) * spread
    return Effect(difference, difference - reach, difference + reach)


@dataclass(frozen=True)
class SeedComparison:
    """Two conditions over independently trained seeds, b minus a.

    t_interval: Welch's t interval over seeds. bootstrap: percentile interval from resampling
    seeds. p: two-sided permutation p; smallest_p: the smallest that so few seeds allow. All but
    the last are nan if a side has a single seed.
    caution: a sentence on what the number of seeds cannot show, or empty.
    """

    difference: float
    spread_a: float
    spread_b: float
    t_interval: tuple[float, float]
    bootstrap: tuple[float, float]
    p: float
    smallest_p: float
    caution: str


def seed_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, seed: int = 0
) -> SeedComparison:
    """Compare a measure between conditions trained over several seeds.

    a, b: one value a seed, at least one each. Spreads are standard deviations over seeds (ddof 1),
    nan for a single seed. The permutation test deals the pooled values anew in every way (if there
    are more than 20,000 ways, in a random sample of them); under the hypothesis that the condition
    makes no difference, every dealing is equally likely.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not len(x) or not len(y):
        raise MeasureError("comparing seeds needs at least one value on each side")
    observed = float(y.mean() - x.mean())
    spread_a, spread_b = (float(v.std(ddof=1)) if len(v) > 1 else math.nan for v in (x, y))
    interval = bootstrap = math.nan, math.nan
    p, fewest = math.nan, min(len(x), len(y))
    if fewest > 1:
        va, vb = spread_a**2 / len(x), spread_b**2 / len(y)
        df = _welch_df(va, vb, len(x), len(y))
        reach = float(scipy.stats.t.ppf((1 + level) / 2, df)) * math.sqrt(va + vb)
        interval = observed - reach, observed + reach
        generator = np.random.default_rng(seed)
        resampled = scipy.stats.bootstrap(
            (x, y),
            _mean_difference,
            n_resamples=10_000,
            confidence_level=level,
            method="percentile",
            rng=generator,
        )
        low, high = resampled.confidence_interval
        bootstrap = float(low), float(high)
        permuted = scipy.stats.permutation_test(
            (x, y), _size_of_difference, n_resamples=20_000, alternative="greater", rng=generator
        )
        p = float(permuted.pvalue)
    # With equally many seeds each dealing has its mirror image, equally extreme.
    smallest = (2 if len(x) == len(y) else 1) / math.comb(len(x) + len(y), len(x))
    caution = ""
    if smallest > 1 - level:
        caution = (
            f"With {len(x)} and {len(y)} seeds no permutation test can give less than "
            f"p = {smallest:.2g}, and a bootstrap of so few seeds is too narrow: read the t "
            f"interval{' once both sides have two seeds' if fewest < 2 else ''}."
        )
    return SeedComparison(observed, spread_a, spread_b, interval, bootstrap, p, smallest, caution)


def _mean_difference(x: Floats, y: Floats, axis: int = -1) -> Any:
    return y.mean(axis) - x.mean(axis)


def _size_of_difference(x: Floats, y: Floats, axis: int = -1) -> Any:
    return np.abs(_mean_difference(x, y, axis))


def welch(n_a: int, mean_a: float, var_a: float, n_b: int, mean_b: float, var_b: float) -> TTest:
    """Welch's t test of b against a from sizes, means and variances (ddof 1), as §5.1 has it.

    Over the pairs of two dictionaries its t is not what it seems: n features make n (n-1) / 2
    pairs, and each feature enters n - 1 of them, so that the pairs are far from independent and
    the standard error is too small by up to a factor of √n. A large |t| then says that there are
    many pairs, not that the difference would come again. Use the bootstrap over features and the
    comparison over seeds. d: the difference over the root of the mean variance, which does not
    grow with the number of pairs.
    """
    if n_a < 2 or n_b < 2:
        raise MeasureError("Welch's test needs two values on each side")
    va, vb = var_a / n_a, var_b / n_b
    difference = mean_b - mean_a
    if va + vb == 0:
        raise MeasureError("Welch's test needs values that vary")
    t = difference / math.sqrt(va + vb)
    df = _welch_df(va, vb, n_a, n_b)
    p = 2 * float(scipy.stats.t.sf(abs(t), df))
    return TTest(difference, t, df, p, difference / math.sqrt((var_a + var_b) / 2))


def paired_t(differences: ArrayLike) -> TTest:
    """Paired t test. differences: (n,), one for each pair. d: their mean over their deviation."""
    x = np.asarray(differences, np.float64)
    if len(x) < 2 or x.std(ddof=1) == 0:
        raise MeasureError("a paired t test needs at least two differences that vary")
    d = float(x.mean() / x.std(ddof=1))
    t = d * math.sqrt(len(x))
    return TTest(float(x.mean()), t, len(x) - 1, 2 * float(scipy.stats.t.sf(abs(t), len(x) - 1)), d)


def paired_difference(differences: ArrayLike, level: float = 0.95) -> Effect:
    """Mean of paired differences with its t interval; no interval for a single one."""
    x = np.asarray(differences, np.float64)
    if len(x) == 0:
        raise MeasureError("there are no differences to average")
    mean = float(x.mean())
    if len(x) == 1:
        return Effect(mean, math.nan, math.nan)
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    reach = float(scipy.stats.t.ppf((1 + level) / 2, len(x) - 1)) * error
    return Effect(mean, mean - reach, mean + reach)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    if n < 1 or not 0 <= successes <= n:
        raise MeasureError(f"{successes} of {n} is not a share")
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def share_higher(differences: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Share of pairs with a positive difference, ties left out: (share, low, high), Wilson's."""
    x = np.asarray(differences, np.float64)
    higher, lower = int((x > 0).sum()), int((x < 0).sum())
    if higher + lower == 0:
        raise MeasureError("every difference is zero: no share is higher")
    low, high = wilson(higher, higher + lower, level)
    return higher / (higher + lower), low, high


def needed(d: float, power: float = 0.8, level: float = 0.95) -> int:
    """Pairs that show an effect of size d that often: ((z_level + z_power) / d)², about normal."""
    if d == 0 or not 0 < power < 1 or not 0 < level < 1:
        raise MeasureError("power needs an effect that is not zero and shares between 0 and 1")
    z = float(scipy.stats.norm.ppf((1 + level) / 2) + scipy.stats.norm.ppf(power))
    return math.ceil((z / d) ** 2)


def _welch_df(va: float, vb: float, n_a: int, n_b: int) -> float:
    if va + vb == 0:
        return float(n_a + n_b - 2)
    return (va + vb) ** 2 / (va**2 / (n_a - 1) + vb**2 / (n_b - 1))
