"""Intervals, tests and effect sizes: over features, over seeds, and over pairs as the paper has it.

Nothing here knows of models or runs: arrays in, small results out.

Arms of one seed start from the same weights and read the same text, so they are compared as pairs.
Two questions can be asked of a difference: what *other features* of the same trainings would give
(`feature_difference`), and what *other trainings* would give (`over_seeds`). Every training has
features of its own, so the scatter between seeds holds both, and its interval answers both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from metasae_lib.study import MeasureError

Floats = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Effect:
    """A difference with its interval. `low` and `high` are nan where the data allow none.

    scatter: standard deviation of one of the differences that it is the mean of, if known.
    """

    difference: float
    low: float
    high: float
    scatter: float = math.nan


@dataclass(frozen=True)
class TTest:
    """A t test: statistic, degrees of freedom, two-sided p, and Cohen's d."""

    difference: float
    t: float
    df: float
    p: float
    d: float


def feature_draws(n_features: int, n_resamples: int = 200, seed: int = 0) -> NDArray[np.float32]:
    """How often each feature is drawn in each resample of the features, (n_features, n_resamples).

    Dictionaries that are compared take the same draws, so that feature i comes with feature i.
    """
    if n_features < 2 or n_resamples < 2:
        raise MeasureError("a bootstrap over features needs two features and two resamples")
    generator, even = np.random.default_rng(seed), np.full(n_features, 1 / n_features)
    return generator.multinomial(n_features, even, size=n_resamples).T.astype(np.float32)


def bootstrap_mean_abs(
    blocks: Iterable[tuple[slice, NDArray[np.float32]]], draws: NDArray[np.float32]
) -> Floats:
    """mean |φ| in resamples of the features, (n_resamples,).

    The n (n-1) / 2 pairs hang together through n features, so features are drawn, not pairs: with
    w_i the times that feature i is drawn, a resample has the mean

        Σ_{i<j} w_i w_j |φ_ij| / Σ_{i<j} w_i w_j,

    a pair of a feature with its own copy left out. blocks: the (m, m) matrix of |φ| by blocks of
    rows with a zero diagonal (`phi.abs_phi_blocks`), float32: each mean is right to about 1e-6 of
    itself. draws: (m, n_resamples), the rows of `feature_draws` for these m features; a feature
    that is dead here was drawn as well, and its pairs are missing on this side alone. Cost:
    m² n_resamples multiply-adds.
    """
    total = np.zeros(draws.shape[1])
    for rows, block in blocks:
        total += np.einsum("ir,ir->r", draws[rows], block @ draws, dtype=np.float64)
    exact = draws.astype(np.float64)
    return total / (exact.sum(axis=0) ** 2 - (exact**2).sum(axis=0))


def feature_difference(
    difference: float, replicates_a: Floats, replicates_b: Floats, level: float = 0.95
) -> Effect:
    """Interval of mean |φ| of b minus that of a, for other features of the same two trainings.

    difference: the observed one, b - a. replicates: `bootstrap_mean_abs` of each with the same
    draws if features come in pairs, with draws of their own if not. The interval is difference ± z
    times the standard deviation of the replicates' differences: percentiles would be shifted,
    since copies of a feature thin a resample out. Other trainings are another question, see
    `over_seeds`.
    """
    spread = float(np.std(replicates_b - replicates_a, ddof=1))
    reach = float(scipy.stats.norm.ppf((1 + level) / 2)) * spread
    return Effect(difference, difference - reach, difference + reach)


def over_seeds(differences: Mapping[K, ArrayLike], level: float = 0.95) -> dict[K, Effect]:
    """Mean difference of each setting, with the interval that holds for new seeds and features.

    differences: by setting one value a seed, of the arm minus its own solo arm; nan is left out.
    The variance around each setting's mean is pooled over the settings, which are taken to scatter
    alike; so a setting with a single seed has an interval if another has two. Each dictionary has
    features of its own, so that this variance holds the scatter over features too. No interval
    where no setting has two seeds.
    """
    kept = {key: np.asarray(values, np.float64) for key, values in differences.items()}
    kept = {key: values[~np.isnan(values)] for key, values in kept.items()}
    df = sum(max(len(values) - 1, 0) for values in kept.values())
    squares = sum(float(np.sum((v - v.mean()) ** 2)) for v in kept.values() if len(v))
    scatter = math.sqrt(squares / df) if df else math.nan
    effects = {}
    for key, values in kept.items():
        mean = float(values.mean()) if len(values) else math.nan
        reach = _reach(scatter, df, len(values), level) if df and len(values) else math.nan
        effects[key] = Effect(mean, mean - reach, mean + reach, scatter)
    return effects


def seeds_interval(effect: Effect, n_seeds: int, level: float = 0.95) -> tuple[float, float]:
    """The interval that an effect of this size and scatter would have with so many seeds."""
    reach = _reach(effect.scatter, n_seeds - 1, n_seeds, level)
    return effect.difference - reach, effect.difference + reach


def expected_reach(low: float, high: float, n_seeds: int, wanted: int) -> float:
    """Half the length that the interval of `n_seeds` differences would have with `wanted` of them.

    nan where either number of seeds gives none.
    """
    if min(n_seeds, wanted) < 2:
        return math.nan
    one, other = (_reach(1.0, n - 1, n, 0.95) for n in (n_seeds, wanted))
    return (high - low) / 2 * other / one


def _reach(scatter: float, df: int, n: int, level: float) -> float:
    return float(scipy.stats.t.ppf((1 + level) / 2, df)) * scatter / math.sqrt(n)


def crossed_interval(differences: ArrayLike, level: float = 0.95) -> Floats:
    """Mean of differences (seeds, parts of text) with its ends, for new seeds and new text: (3,).

    Every seed meets the same text, so both scatter crosswise: with the mean squares of a two-way
    table without repetition the variance of the mean is (MS_seed + MS_text - MS_rest) / (S R), and
    its degrees of freedom are Satterthwaite's. With one seed the interval holds for new text alone;
    with one part there is none.
    """
    x = np.asarray(differences, np.float64)
    n_seeds, n_parts = x.shape
    mean = float(x.mean())
    if n_parts < 2:
        return np.array([mean, math.nan, math.nan])
    if n_seeds == 1:
        effect = paired_difference(x[0], level)
        return np.array([mean, effect.low, effect.high])
    by_seed, by_text = x.mean(axis=1), x.mean(axis=0)
    rest = x - by_seed[:, None] - by_text[None] + mean
    dfs = np.array([n_seeds - 1, n_parts - 1, (n_seeds - 1) * (n_parts - 1)])
    squares = n_parts * by_seed.var(ddof=1), n_seeds * by_text.var(ddof=1), (rest**2).sum() / dfs[2]
    signed = np.array([1, 1, -1]) * squares
    # The difference of mean squares can come out below what either part alone is known to give.
    total = max(signed.sum(), max(squares[:2]))
    df = total**2 / float((signed**2 / dfs).sum()) if total else 1.0
    reach = float(scipy.stats.t.ppf((1 + level) / 2, df)) * math.sqrt(total / x.size)
    return np.array([mean, mean - reach, mean + reach])


def unpaired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Effect:
    """Mean of b minus mean of a with Welch's t interval, as of two groups that share nothing.

    No interval where a side has a single value.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not len(x) or not len(y):
        raise MeasureError("comparing two groups needs at least one value on each side")
    difference = float(y.mean() - x.mean())
    if min(len(x), len(y)) < 2:
        return Effect(difference, math.nan, math.nan)
    interval = scipy.stats.ttest_ind(y, x, equal_var=False).confidence_interval(level)
    return Effect(difference, float(interval.low), float(interval.high))


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
    df = (va + vb) ** 2 / (va**2 / (n_a - 1) + vb**2 / (n_b - 1))
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
    if not np.size(differences):
        raise MeasureError("there are no differences to average")
    return over_seeds({"": differences}, level)[""]


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
    if d == 0:
        raise MeasureError("no number of pairs shows an effect of zero")
    return math.ceil((smallest(power=power, level=level) / d) ** 2)


def smallest(spread: float = 1, n: int = 1, power: float = 0.8, level: float = 0.95) -> float:
    """The difference that the mean of n values with this deviation shows that often."""
    if n < 1 or not 0 < power < 1 or not 0 < level < 1:
        raise MeasureError("power needs a value at least and shares between 0 and 1")
    z = float(scipy.stats.norm.ppf((1 + level) / 2) + scipy.stats.norm.ppf(power))
    return z * spread / math.sqrt(n)
