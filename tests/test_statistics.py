from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from metasae_lib.measure.statistics import (
    bootstrap_mean_abs,
    feature_difference,
    needed,
    paired_difference,
    paired_t,
    seed_difference,
    share_higher,
    welch,
    wilson,
)
from metasae_lib.study.errors import MeasureError


def symmetric(n: int, seed: int) -> np.ndarray:
    """|φ|-like with effects of features, so that pairs hang together."""
    generator = np.random.default_rng(seed)
    feature = generator.gamma(2, 0.5, n)
    sizes = np.outer(feature, feature) * generator.gamma(2, 0.5, (n, n))
    sizes = np.triu(sizes, 1)
    return (sizes + sizes.T).astype(np.float32)


def in_blocks(sizes: np.ndarray, rows: int = 7) -> list[tuple[slice, np.ndarray]]:
    return [(slice(i, i + rows), sizes[i : i + rows]) for i in range(0, len(sizes), rows)]


def test_bootstrap_equals_listing_the_resampled_pairs() -> None:
    sizes = symmetric(20, 0)
    ours = bootstrap_mean_abs(in_blocks(sizes), 30, seed=5)
    weights = np.random.default_rng(5).multinomial(20, np.full(20, 1 / 20), size=30)
    for replicate, times in zip(ours, weights, strict=True):
        drawn = np.repeat(np.arange(20), times)
        pairs = [sizes[i, j] for p, i in enumerate(drawn) for j in drawn[p + 1 :] if i != j]
        assert replicate == pytest.approx(np.mean(pairs, dtype=float), rel=1e-6)


def test_bootstrap_has_the_spread_of_fresh_features_not_that_of_fresh_pairs() -> None:
    n = 80
    means = [symmetric(n, seed)[np.triu_indices(n, 1)].mean() for seed in range(200)]
    spreads = [bootstrap_mean_abs(in_blocks(symmetric(n, s), 40), 200, s).std() for s in range(20)]
    assert np.mean(spreads) == pytest.approx(np.std(means), rel=0.25)
    pairs = symmetric(n, 0)[np.triu_indices(n, 1)]
    assert np.mean(spreads) > 4 * pairs.std() / math.sqrt(len(pairs))  # what Welch assumes


def test_interval_of_a_difference_between_dictionaries() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 7.0])  # differences 1, 1, 4
    effect = feature_difference(0.5, a, b)
    reach = 1.959964 * math.sqrt(3)
    assert (effect.low, effect.high) == pytest.approx((0.5 - reach, 0.5 + reach), rel=1e-6)


def test_welch_equals_scipy_from_raw_values() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 50), generator.normal(0.4, 3, 31)
    ours = welch(50, a.mean(), a.var(ddof=1), 31, b.mean(), b.var(ddof=1))
    theirs = scipy.stats.ttest_ind(b, a, equal_var=False)
    assert (ours.t, ours.p, ours.df) == pytest.approx(
        (theirs.statistic, theirs.pvalue, theirs.df), rel=1e-10
    )
    assert ours.d == pytest.approx(ours.difference / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def test_the_papers_t_and_the_spread_it_implies() -> None:
    # NOTES 2.3: t = -53.1 over 209M pairs means a standard deviation of |φ| near 0.033.
    implied = 1.7e-4 * math.sqrt(209e6 / 2) / 53.1
    assert implied == pytest.approx(0.033, rel=0.02)
    ours = welch(209_000_000, 2.27e-3, implied**2, 209_000_000, 2.10e-3, implied**2)
    assert ours.t == pytest.approx(-53.1, rel=1e-6)


def test_paired_t_and_the_papers_fuzzing_effect() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0, 1, 40), generator.normal(0.3, 1, 40)
    ours, theirs = paired_t(b - a), scipy.stats.ttest_rel(b, a)
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-10)
    interval = theirs.confidence_interval(0.95)
    effect = paired_difference(b - a)
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    # NOTES 2.9: t = 8.12 over 20,456 pairs is d = 0.057, and needs about 2,400 pairs.
    assert ours.d == pytest.approx(ours.t / math.sqrt(40))
    assert needed(8.12 / math.sqrt(20456)) == pytest.approx(2436, abs=5)


def test_power_equals_a_simulation() -> None:
    n, d = needed(0.5, power=0.8), 0.5
    generator = np.random.default_rng(0)
    t = scipy.stats.ttest_1samp(generator.normal(d, 1, (4000, n)), 0, axis=1)
    assert (t.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.04)


def test_wilson_and_the_share_that_is_higher() -> None:
    theirs = scipy.stats.binomtest(7, 20).proportion_ci(method="wilson")
    assert wilson(7, 20) == pytest.approx((theirs.low, theirs.high), rel=1e-10)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    share, low, high = share_higher([1, 2, -1, 0, 0, 3])
    assert share == 0.75 and (low, high) == wilson(3, 4)
    # NOTES 2.9: 51.6% of pairs; its interval leaves one half out.
    assert wilson(round(0.516 * 20456), 20456)[0] > 0.5


def test_seeds_t_interval_and_exact_permutation() -> None:
    a, b = [2.0, 2.2, 2.1, 2.4], [1.0, 1.3, 1.1, 1.2]
    ours = seed_difference(a, b)
    theirs = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert ours.t_interval == pytest.approx((theirs.low, theirs.high), rel=1e-10)
    test = scipy.stats.permutation_test(
        (np.array(a), np.array(b)), lambda x, y: y.mean() - x.mean(), n_resamples=np.inf
    )
    assert ours.p == pytest.approx(test.pvalue) == 2 / 70
    assert ours.smallest_p == 2 / 70 and ours.caution == ""
    assert ours.t_interval[0] < ours.bootstrap[0] < ours.difference < ours.bootstrap[1]


def test_few_seeds_say_what_they_cannot_show() -> None:
    two = seed_difference([1.0, 1.1], [2.0, 2.2])
    assert two.p == two.smallest_p == 1 / 3 and "no permutation test" in two.caution
    one = seed_difference([1.0], [2.0])
    assert math.isnan(one.t_interval[0]) and math.isnan(one.spread_a) and math.isnan(one.p)
    unequal = seed_difference([1.0], [2.0, 2.1, 2.2])
    assert unequal.smallest_p == 1 / 4


def test_many_seeds_sample_the_permutations() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 20), generator.normal(1, 1, 20)
    ours = seed_difference(a, b)  # type: ignore[arg-type]
    assert ours.p == pytest.approx(scipy.stats.ttest_ind(a, b).pvalue, abs=0.01)


def test_what_cannot_be_computed_is_one_sentence() -> None:
    for call in (
        lambda: welch(1, 0, 1, 5, 0, 1),
        lambda: welch(5, 0, 0, 5, 0, 0),
        lambda: paired_t([1.0, 1.0]),
        lambda: paired_difference([]),
        lambda: wilson(3, 2),
        lambda: share_higher([0.0]),
        lambda: needed(0.0),
        lambda: seed_difference([], [1.0]),
        lambda: bootstrap_mean_abs([]),
    ):
        with pytest.raises(MeasureError):
            call()
