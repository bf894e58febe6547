"""Arms as pairs: against their own solo arm, over seeds, and against the solo curve at equal L2."""

from __future__ import annotations

from types import SimpleNamespace as Fake

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from scipy.sparse import csr_matrix

from metasae_lib import Run
from metasae_lib.measure import (
    CooccurrenceCounter,
    effects,
    frontier_table,
    pair_table,
    paired_measures,
    phi,
    resampled_mean_abs,
    same_features,
    setting_table,
    summarise,
)
from metasae_lib.measure.counting import Counts
from metasae_lib.measure.matching import pw_mcc
from metasae_lib.study import ArmSpec
from metasae_lib.train import BatchTopK


def table(rows: list[tuple[object, ...]]) -> tuple[pd.DataFrame, pd.DataFrame, dict]:  # type: ignore[type-arg]
    """phi and fidelity tables, and replicates, of arms (spec, 10⁴ mean |φ|, 10⁴ null, L2, CE)."""
    frame = pd.DataFrame(
        [
            {"arm": spec.name, **vars(spec), "mean_abs": 1e-4 * mean, "null_mean_abs": 1e-4 * null,
             "l2": l2, "ce_overhead_pct": ce}
            for spec, mean, null, l2, ce in rows
        ]
    )  # fmt: skip
    shared = np.random.default_rng(0).normal(0, 2e-5, 500)
    own = np.random.default_rng(1).normal(0, 1e-6, (len(frame), 500))
    draws = {arm: m + shared + d for arm, m, d in zip(frame.arm, frame.mean_abs, own, strict=True)}
    return frame.drop(columns=["l2", "ce_overhead_pct"]), frame, draws


SOLO = [ArmSpec("solo", seed) for seed in range(3)]
JOINT = [ArmSpec("joint", seed, 0.3, 1.0) for seed in range(3)]
ROWS = [
    (SOLO[0], 20.0, 2.0, 0.100, 10.0), (SOLO[1], 22.0, 2.0, 0.102, 11.0),
    (SOLO[2], 21.0, 2.0, 0.101, 12.0),
    (JOINT[0], 19.0, 2.0, 0.110, 12.0), (JOINT[1], 20.9, 2.0, 0.112, 14.0),
    (JOINT[2], 20.16, 2.0, 0.111, 13.0),
    (ArmSpec("joint", 0, 1.0, 1.0), 21.0, 2.0, 0.140, 20.0),
    *((ArmSpec("frontier", seed, k=k), solo - fall, 2.0, l2, 15.0)
      for seed, solo in enumerate((20.0, 22.0, 21.0))
      for k, fall, l2 in ((6, 0.5, 0.107), (4, 1.5, 0.127))),
    (ArmSpec("ortsae", 0), 18.0, 2.0, 0.105, 11.0),
]  # fmt: skip


def test_each_arm_is_held_against_the_solo_arm_of_its_seed(run: Run) -> None:
    found = pair_table(run, *table(ROWS)).set_index("arm")
    joint = found.loc[JOINT[1].name]
    assert joint.d_mean_abs_phi_pct == pytest.approx(100 * (20.9 / 22 - 1)) == -5
    assert joint.d_excess_pct == pytest.approx(100 * (18.9 / 20 - 1))
    assert joint.d_l2_pct == pytest.approx(100 * (0.112 / 0.102 - 1))
    assert joint.d_ce_points == 3 and joint.selected and joint.setting == "joint-lambda0.3-sigma1"
    # What both arms share in a resample is no part of their difference: 1.96 √2 · 1e-6 of 22e-4.
    reach = 1.96 * np.sqrt(2) * 1e-6 / 22e-4 * 100
    assert joint.high - joint.d_mean_abs_phi_pct == pytest.approx(reach, rel=0.1)
    other = found.loc["solo-seed2"]  # not a pair: the scatter that has no cause
    assert other.d_mean_abs_phi_pct == pytest.approx(5) and not other.selected


def test_settings_over_seeds_and_those_with_one_seed(run: Run) -> None:
    found = setting_table(pair_table(run, *table(ROWS))).set_index("setting")
    selected = found.loc["joint-lambda0.3-sigma1"]
    theirs = scipy.stats.t.interval(0.95, 2, -4.6667, scipy.stats.sem([-5, -5, -4]))
    assert (selected.low, selected.high) == pytest.approx(theirs, rel=1e-3)
    assert selected.n_seeds == 3 and selected.over == "seeds and features"
    alone = found.loc["joint-lambda1-sigma1"]  # takes the scatter of the setting with three
    reach = scipy.stats.t.ppf(0.975, 2) * np.std([-5, -5, -4], ddof=1)
    assert alone.high - alone.low == pytest.approx(2 * reach)
    assert found.loc["ortsae", "over"] == "features"
    assert found.loc["ortsae", "high"] > found.loc["ortsae", "low"]


def test_a_joint_arm_against_the_solo_curve_at_its_own_l2(run: Run) -> None:
    found = frontier_table(run, *table(ROWS)).set_index("arm")
    # Seed 0: at L2 0.110 the curve lies 3/20 of the way from 19.5 (0.107) to 18.5 (0.127).
    curve = 19.5 - 0.15
    assert found.loc[JOINT[0].name, "d_mean_abs_phi_pct"] == pytest.approx(100 * (19 / curve - 1))
    assert found.loc[JOINT[0].name, "d_excess_pct"] == pytest.approx(100 * (17 / (curve - 2) - 1))
    assert found.loc[JOINT[0].name, "low"] < found.loc[JOINT[0].name, "high"]
    assert np.isnan(found.loc["joint-lambda1-sigma1-seed0", "d_mean_abs_phi_pct"])  # beyond its end


def test_the_headline_under_each_way_to_compare(run: Run) -> None:
    phi_table, fidelity, draws = table(ROWS)
    pairs = pair_table(run, phi_table, fidelity, draws)
    frontier = frontier_table(run, phi_table, fidelity, draws)
    found = effects(phi_table, pairs, frontier)
    assert list(found.way) == ["features"] * 3 + [
        "seeds", "unpaired", "other seeds", "frontier", "excess"
    ]  # fmt: skip
    by_way = found.drop_duplicates("way").set_index("way")
    assert by_way.loc["seeds", "change_pct"] == pytest.approx(-14 / 3)
    apart = by_way.loc["unpaired"]
    assert apart.change_pct == pytest.approx(100 * ((19 + 20.9 + 20.16) / 63 - 1))
    paired_width = by_way.loc["seeds", "high"] - by_way.loc["seeds", "low"]
    assert apart.high - apart.low > 3 * paired_width
    assert by_way.loc["other seeds", "change_pct"] == pytest.approx(100 * (19 / 21.5 - 1))
    ends = by_way.loc["frontier", ["low", "change_pct", "high"]].tolist()
    assert ends == sorted(ends) and ends[0] > by_way.loc["seeds", "low"]
    # Without a frontier nothing is said of it, and one pair has its features alone.
    one = [row for row in ROWS if row[0].seed == 0 and row[0].kind != "frontier"]
    phi_table, fidelity, draws = table(one)
    pairs = pair_table(run, phi_table, fidelity, draws)
    found = effects(phi_table, pairs, frontier_table(run, phi_table, fidelity, draws))
    assert list(found.way) == ["features"]


def counted(fired: np.ndarray) -> Counts:
    counter = CooccurrenceCounter(fired.shape[1])
    counter.update(csr_matrix(fired))
    return Counts(counter.n11.numpy(), counter.n1_a.numpy(), counter.n_tokens)


def test_arms_are_resampled_by_the_same_features(run: Run) -> None:
    """Equal counts have equal replicates; a feature that is dead only loses its pairs."""
    n = run.profile.dictionary.n_features
    generator = np.random.default_rng(0)
    fired = generator.random((400, n)) < 0.1
    with_dead = fired.copy()
    with_dead[:, 5] = False
    counts = {"a": counted(fired), "b": counted(fired), "c": counted(with_dead)}
    found = resampled_mean_abs(run, counts)
    assert np.array_equal(found["a"], found["b"])
    assert np.corrcoef(found["a"], found["c"])[0, 1] > 0.9
    for name, each in counts.items():
        alive = np.flatnonzero(each.alive)
        sizes = np.abs(phi(each.n11, each.n1, each.n1, each.n_tokens))[np.ix_(alive, alive)]
        mean = sizes[np.triu_indices(len(alive), 1)].mean()
        assert summarise(each).mean_abs == pytest.approx(mean)
        assert found[name].mean() == pytest.approx(mean, rel=0.05)


def test_same_features_by_hand(run: Run) -> None:
    def arm(spec: ArmSpec, rows: torch.Tensor) -> Fake:
        sae = BatchTopK(24, 40, 4, spec.seed)
        sae.W_dec.data = rows
        return Fake(spec=spec, sae=sae)

    starts = [BatchTopK(24, 40, 4, seed).W_dec.detach() for seed in (0, 1)]
    other = torch.nn.functional.normalize(starts[0] + 0.1 * starts[1], dim=1)
    arms = {
        "solo-seed0": arm(ArmSpec("solo", 0), starts[0]),
        "solo-seed1": arm(ArmSpec("solo", 1), starts[1]),
        "joint": arm(ArmSpec("joint", 0, 0.3, 1.0), other.flip(0)),
    }
    found = same_features(run, arms).set_index(["comparison", "of"])  # type: ignore[arg-type]
    assert found.loc[("solo and its start", "row"), "cosine"] == pytest.approx(1)
    partner = found.loc["joint and its solo partner"].cosine
    assert partner["nearest"] > 0.98 and partner["row"] < 0.3  # the rows are there, in other places
    cosines = (starts[0] @ starts[1].T).numpy()
    by_hand = (cosines.max(axis=0).mean() + cosines.max(axis=1).mean()) / 2
    assert found.loc[("two solo seeds", "nearest"), "cosine"] == pytest.approx(by_hand, abs=1e-6)
    random = found.loc[("random directions", "nearest"), "cosine"]
    assert random == pytest.approx(by_hand, abs=1e-6)
    assert pw_mcc(starts[0], starts[0].flip(0)) == pytest.approx(1)


def test_any_measure_is_compared_as_pairs(run: Run) -> None:
    """The numbers of mean |φ|, which `pair_table` and `frontier_table` give in percent."""
    phi_of, fidelity, draws = table(ROWS)
    arms = fidelity.assign(mean_abs=1e4 * fidelity.mean_abs)
    found = paired_measures(run, arms, ["mean_abs"]).set_index(["setting", "against"])
    solo = found.loc["solo", ""]
    assert (solo.base, solo.scatter, solo.n_seeds) == (pytest.approx(21), pytest.approx(1), 3)
    joint = found.loc["joint", "solo"]
    assert joint.change == pytest.approx(np.mean([-1, -1.1, -0.84]))
    theirs = scipy.stats.ttest_1samp([-1, -1.1, -0.84], 0).confidence_interval()
    assert (joint.low, joint.high) == pytest.approx((theirs.low, theirs.high))
    equal = found.loc["joint", "equal L2"]
    pairs = frontier_table(run, phi_of, fidelity, draws)
    pairs = pairs[pairs.selected]
    base = np.array([19, 20.9, 20.16]) / (1 + pairs.d_mean_abs_phi_pct.to_numpy() / 100)
    assert equal.base == pytest.approx(base.mean())
    assert equal.change == pytest.approx((np.array([19, 20.9, 20.16]) - base).mean())
    assert found.loc["solo, k = 4", "solo"].change == pytest.approx(-1.5)
