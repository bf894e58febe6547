from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from metasae_lib.measure.statistics import (
    Effect,
    bootstrap_mean_abs,
    crossed_interval,
    expected_reach,
    feature_difference,
    feature_draws,
    needed,
    over_seeds,
    paired_difference,
    paired_t,
    seeds_interval,
    share_higher,
    unpaired_difference,
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


def resampled(sizes: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    return bootstrap_mean_abs(in_blocks(sizes, 40), feature_draws(len(sizes), n_resamples, seed))


def test_bootstrap_equals_listing_the_resampled_pairs() -> None:
    """Of 20 features 17 are alive; the draws know nothing of that."""
    sizes, alive = symmetric(20, 0), np.arange(20) % 7 != 3
    draws = feature_draws(20, 30, seed=5)
    assert draws.shape == (20, 30) and (draws.sum(axis=0) == 20).all()
    ours = bootstrap_mean_abs(in_blocks(sizes[alive][:, alive]), draws[alive])
    for replicate, times in zip(ours, draws.T.astype(int), strict=True):
        drawn = [i for i in np.repeat(np.arange(20), times) if alive[i]]
        pairs = [sizes[i, j] for p, i in enumerate(drawn) for j in drawn[p + 1 :] if i != j]
        assert replicate == pytest.approx(np.mean(pairs, dtype=float), rel=1e-6)


def test_bootstrap_has_the_spread_of_fresh_features_not_that_of_fresh_pairs() -> None:
    n = 80
    means = [symmetric(n, seed)[np.triu_indices(n, 1)].mean() for seed in range(200)]
    spreads = [resampled(symmetric(n, s), 200, s).std() for s in range(20)]
    assert np.mean(spreads) == pytest.approx(np.std(means), rel=0.25)
    pairs = symmetric(n, 0)[np.triu_indices(n, 1)]
    assert np.mean(spreads) > 4 * pairs.std() / math.sqrt(len(pairs))  # what Welch assumes


N, TRUE_CHANGE = 60, -0.03  # of a joint arm, in shares of mean |φ|


def trainings(n_seeds: int, seed_effect: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """|φ| of solo and joint arms whose difference is known: pairs that share their features.

    Each training draws its features anew; the joint arm has the same ones, each a little changed,
    and is TRUE_CHANGE lower, give or take what its seed does to the pair.
    """
    generator, pairs = np.random.default_rng(seed), []
    upper = np.triu(np.ones((N, N)), 1)
    for _ in range(n_seeds):
        feature = generator.gamma(8, 1 / 8, N)
        noise = upper * generator.gamma(4, 1 / 4, (N, N))
        moved = feature * generator.normal(1, 0.05, N)
        change = 1 + TRUE_CHANGE + generator.normal(0, seed_effect)
        solo, joint = np.outer(feature, feature) * noise, change * np.outer(moved, moved) * noise
        pairs.append(tuple((each + each.T).astype(np.float32) for each in (solo, joint)))
    return pairs


def mean_of(sizes: np.ndarray) -> float:
    return float(sizes[np.triu_indices(N, 1)].mean(dtype=float))


def covered(effects: list[Effect], truth: float) -> float:
    return float(np.mean([effect.low <= truth <= effect.high for effect in effects]))


@pytest.mark.parametrize("seed_effect", [0.0, 0.02])
def test_the_interval_over_seeds_holds_for_new_seeds_and_features(seed_effect: float) -> None:
    """2,000 studies of four pairs each. One training's mean is 1, so the truth is TRUE_CHANGE."""
    paired, apart, of_features = [], [], []
    for study in range(2000):
        pairs = trainings(4, seed_effect, study)
        solo, joint = (np.array([mean_of(pair[side]) for pair in pairs]) for side in (0, 1))
        paired.append(over_seeds({"": joint - solo})[""])
        apart.append(unpaired_difference(solo, joint))
        if study < 400:
            a, b = (resampled(each, 60, study) for each in pairs[0])
            of_features.append(feature_difference(joint[0] - solo[0], a, b))
    assert 0.93 < covered(paired, TRUE_CHANGE) < 0.97
    # Two groups that share nothing: too wide by far, since the level of a training is in each pair.
    assert covered(apart, TRUE_CHANGE) > 0.99
    reach = [np.mean([e.high - e.low for e in effects]) for effects in (paired, apart)]
    assert reach[0] < reach[1] / 3
    # Over the features of one training alone: right if seeds do nothing else, too narrow if not.
    if seed_effect == 0:
        assert 0.90 < covered(of_features, TRUE_CHANGE) < 0.98
    else:
        assert covered(of_features, TRUE_CHANGE) < 0.8


def test_one_seed_has_the_scatter_of_the_settings_that_have_more() -> None:
    """Of many studies, the share that covers a setting with one seed beside one with four."""
    generator, hits = np.random.default_rng(0), []
    for _ in range(4000):
        values = {"selected": generator.normal(1, 2, 4), "other": generator.normal(5, 2, 1)}
        found = over_seeds(values)
        hits.append([found["selected"].low < 1 < found["selected"].high,
                     found["other"].low < 5 < found["other"].high])  # fmt: skip
    assert np.mean(hits, axis=0) == pytest.approx([0.95, 0.95], abs=0.015)
    alone = over_seeds({"a": [1.0], "b": [], "c": [np.nan]})
    assert alone["a"].difference == 1 and all(math.isnan(e.low) for e in alone.values())


def test_more_seeds_narrow_an_interval_as_the_t_interval_says() -> None:
    values = np.random.default_rng(0).normal(0.5, 2, 7)
    effect = over_seeds({"": values})[""]
    assert seeds_interval(effect, 7) == pytest.approx((effect.low, effect.high))
    theirs = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    assert (effect.low, effect.high) == pytest.approx(theirs)
    low, high = seeds_interval(effect, 700)
    assert high - low < (effect.high - effect.low) / 9
    assert expected_reach(effect.low, effect.high, 7, 700) == pytest.approx((high - low) / 2)
    assert math.isnan(expected_reach(0, 1, 1, 6))


@pytest.mark.parametrize(("seed_scatter", "text_scatter"), [(0.0, 1.0), (0.4, 1.0), (0.4, 0.1)])
def test_the_crossed_interval_holds_for_new_seeds_and_new_text(
    seed_scatter: float, text_scatter: float
) -> None:
    generator, hits = np.random.default_rng(0), []
    for _ in range(3000):
        table = 2 + generator.normal(0, seed_scatter, (4, 1))
        table = table + generator.normal(0, text_scatter, (1, 32)) + generator.normal(0, 1, (4, 32))
        _, low, high = crossed_interval(table)
        hits.append(low < 2 < high)
    assert 0.93 < np.mean(hits) < 0.985  # never too narrow; a little wide where one part is nothing
    one = generator.normal(0, 1, (1, 32))
    expected = scipy.stats.ttest_1samp(one[0], 0).confidence_interval()
    assert crossed_interval(one) == pytest.approx([one.mean(), expected.low, expected.high])
    assert np.isnan(crossed_interval(one[:, :1])[1:]).all()


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


def test_two_groups_that_share_nothing_have_welchs_interval() -> None:
    a, b = [2.0, 2.2, 2.1, 2.4], [1.0, 1.3, 1.1]
    va, vb = np.var(a, ddof=1) / 4, np.var(b, ddof=1) / 3
    df = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    reach = scipy.stats.t.ppf(0.975, df) * math.sqrt(va + vb)
    ours, difference = unpaired_difference(a, b), np.mean(b) - np.mean(a)
    expected = difference, difference - reach, difference + reach
    assert (ours.difference, ours.low, ours.high) == pytest.approx(expected)
    assert math.isnan(unpaired_difference([1.0], [2.0, 2.1]).low)


def test_what_cannot_be_computed_is_one_sentence() -> None:
    for call in (
        lambda: welch(1, 0, 1, 5, 0, 1),
        lambda: welch(5, 0, 0, 5, 0, 0),
        lambda: paired_t([1.0, 1.0]),
        lambda: paired_difference([]),
        lambda: wilson(3, 2),
        lambda: share_higher([0.0]),
        lambda: needed(0.0),
        lambda: unpaired_difference([], [1.0]),
        lambda: feature_draws(1),
    ):
        with pytest.raises(MeasureError):
            call()
