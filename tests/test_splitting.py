"""The splitting rule on firing patterns made by hand, in both directions, and the pooled counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasae_lib.interpret.splitting import (
    Rule,
    Side,
    count_directions,
    eligible,
    find,
    least_overlap,
    listed,
    pool,
    reverse,
    seed_pairs,
    two_seeds,
)
from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.study.errors import MeasureError

TOKENS = 10_000
RULE = Rule()


def side(fired: np.ndarray, peaks: list[str] | None = None) -> Side:
    counter = CooccurrenceCounter(fired.shape[1])
    counter.update(fired)
    return Side(counter.counts(), peaks or [" word"] * fired.shape[1])


def cross(a: np.ndarray, b: np.ndarray) -> Any:
    counter = CooccurrenceCounter(a.shape[1], b.shape[1])
    counter.update(a, b)
    return counter.cross_counts()


def firing(*places: range | list[int]) -> np.ndarray:
    fired = np.zeros((TOKENS, len(places)), bool)
    for feature, tokens in enumerate(places):
        fired[list(tokens), feature] = True
    return fired


@pytest.fixture
def split() -> tuple[np.ndarray, np.ndarray]:
    """Feature 0 of A fires on 100 tokens, and B has it in halves; feature 1 is the same in both."""
    a = firing(range(100), range(200, 300))
    b = firing(range(50), range(50, 100), range(200, 300))
    return a, b


def test_a_feature_in_two_halves_is_a_split_and_the_reverse_a_merge(
    split: tuple[np.ndarray, np.ndarray],
) -> None:
    a, b = split
    found = find(cross(a, b), side(a), side(b))
    assert found.feature.tolist() == [0, 0] and found.partner.tolist() == [0, 1]
    # By hand: N = 10000, N11 = 50, N1 = 100 and 50.
    by_hand = (TOKENS * 50 - 100 * 50) / np.sqrt(100 * 9900 * 50 * 9950)
    np.testing.assert_allclose(found.phi, by_hand)
    np.testing.assert_allclose(found.score, by_hand)
    assert found["rank"].tolist() == [1, 1] and found.rate.tolist() == [0.01, 0.01]
    assert np.isnan(found.overlap[0]) and found.overlap[1] < 0
    assert find(reverse(cross(a, b)), side(b), side(a)).empty
    (counts,) = count_directions(cross(a, b), side(a), side(b))
    assert counts == {"splits": 1, "merges": 0, "eligible_a": 2, "eligible_b": 3}
    (swapped,) = count_directions(cross(b, a), side(b), side(a))
    assert (swapped["splits"], swapped["merges"]) == (0, 1)


def test_every_clause_can_take_the_candidate_away(split: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = split
    for changed in (
        {"max_rate": 0.009}, {"min_count": 101}, {"n_partners": 3}, {"min_phi": 0.71},
        {"min_characters": 5},
    ):  # fmt: skip
        assert find(cross(a, b), side(a), side(b), replace(RULE, **changed)).empty, changed
    for token in (" ,", "\n", " a", "--", ""):
        assert find(cross(a, b), side(a, [token, " word"]), side(b)).empty, token
    loose = replace(RULE, min_characters=1)
    assert not find(cross(a, b), side(a, [" a", " b"]), side(b), loose).empty


def test_partners_that_fire_together_count_as_one() -> None:
    a = firing(range(100))
    b = firing(range(80), range(2, 82), range(80, 100))
    found = find(cross(a, b), side(a), side(b), replace(RULE, max_partner_phi=0.5))
    assert found.partner.tolist() == [0, 2]  # 1 is 0 again
    loose = find(cross(a, b), side(a), side(b), replace(RULE, max_partner_phi=1.0))
    assert loose.partner.tolist() == [0, 1, 2]
    assert loose.overlap[1] == pytest.approx(0.974, abs=1e-3)


def test_candidates_are_ranked_by_the_phi_of_their_nth_partner() -> None:
    a = firing(range(100), range(200, 300))
    b = firing(range(80), range(80, 100), range(200, 250), range(250, 300))
    found = find(cross(a, b), side(a), side(b), replace(RULE, min_phi=0.1))
    assert list(dict.fromkeys(found.feature)) == [1, 0]
    assert found.score.is_monotonic_decreasing


def test_against_brute_force_on_random_patterns() -> None:
    rng = np.random.default_rng(0)
    senses = rng.integers(0, 60, TOKENS)
    a = np.stack([np.isin(senses, [2 * i, 2 * i + 1]) for i in range(20)], axis=1)
    b = np.stack([senses == i for i in range(40)], axis=1)
    b ^= rng.random(b.shape) < 0.002
    rule = replace(RULE, max_rate=0.2, min_phi=0.25, max_partner_phi=0.2)
    corr = np.corrcoef(a.T, b.T)
    expected = set()
    for i in range(20):
        partners = np.flatnonzero(corr[i, 20:] >= 0.25)
        if len(partners) >= 2 and corr[20 + partners[0], 20 + partners[1]] <= 0.2:
            expected.add(i)
    found = find(cross(a, b), side(a), side(b), rule)
    assert set(found.feature) == expected and len(expected) == 20


def test_counts_of_other_dictionaries_are_refused(split: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = split
    with pytest.raises(MeasureError, match="give the counts of these two"):
        find(cross(a, b), side(b), side(a))
    with pytest.raises(MeasureError, match="choose 1 to 8"):
        Rule(n_partners=9)


def test_dead_features_are_never_eligible() -> None:
    fired = firing(range(20), [])
    assert eligible(side(fired), replace(RULE, min_count=0)).tolist() == [True, False]


def arm(kind: str, seed: int, selected: bool = True) -> Any:
    point = (0.3, 1.0 if selected else 3.0) if kind == "joint" else (None, None)
    return SimpleNamespace(
        spec=SimpleNamespace(kind=kind, seed=seed, lambda2=point[0], sigma_sq=point[1])
    )


def test_pairs_of_two_and_of_three_seeds() -> None:
    arms = {f"{kind}{seed}": arm(kind, seed) for kind in ("solo", "joint") for seed in range(3)}
    arms["other"] = arm("joint", 0, selected=False)
    assert set(two_seeds(arms, (0.3, 1.0))) == {"solo0", "solo1", "joint0", "joint1"}
    pairs = seed_pairs(arms, (0.3, 1.0))
    assert pairs.role.value_counts().to_dict() == {"joint": 3, "same start": 3, "null": 3}
    assert "other" not in set(pairs.b)
    del arms["solo2"]
    pairs = seed_pairs(arms, (0.3, 1.0))
    assert pairs[pairs.role == "null"].to_numpy().tolist() == [["null", "solo0", "solo1"]]
    assert pairs[pairs.role == "joint"].b.tolist() == ["joint1", "joint0"]
    arms["ortsae0"] = arm("ortsae", 0)
    assert set(two_seeds(arms, (0.3, 1.0))) >= {"ortsae0"}
    pairs = seed_pairs(arms, (0.3, 1.0))
    assert pairs[pairs.role == "ortsae"].to_numpy().tolist() == [["ortsae", "solo1", "ortsae0"]]
    del arms["solo1"]
    assert seed_pairs(arms, (0.3, 1.0)).to_numpy().tolist() == [["same start", "solo0", "joint0"]]


def pairs_of(splits: int, merges: int, null: int) -> pd.DataFrame:
    columns = ["role", "splits", "merges", "eligible_a", "eligible_b"]
    rows = [
        ("joint", splits, merges, 1000, 1000),
        ("same start", 999, 0, 1000, 1000),
        ("null", null, null, 1000, 1000),
    ]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(
    ("splits", "merges", "null", "says"),
    [
        (120, 60, 50, "splits more than it merges"),
        (60, 120, 50, "merging that prevails"),
        (120, 60, 130, "a second solo dictionary splits them as well"),
        (60, 55, 5, "do not outnumber"),
        (0, 0, 0, "No feature splits"),
    ],
)
def test_the_sentence_follows_the_numbers(splits: int, merges: int, null: int, says: str) -> None:
    found = pool(pairs_of(splits, merges, null))
    assert says in found.sentence()
    assert found.supported == (says == "splits more than it merges")
    assert (found.splits, found.merges) == (splits, merges)  # the same start is left out
    assert found.null_share == null / 1000


def test_pooling_needs_its_null() -> None:
    frame = pairs_of(900, 1, 1)
    found = pool(frame[frame.role == "same start"])
    assert not found.supported and "one seed" in found.sentence()
    assert pool(frame).supported


def test_the_papers_own_partners_must_overlap() -> None:
    """Table 2 (0.710, 0.799) and Table 4 (0.741, 0.875): worked by hand on paper."""
    assert least_overlap(0.710, 0.799) == pytest.approx(0.1438, abs=1e-4)
    assert least_overlap(0.741, 0.875) == pytest.approx(0.3233, abs=1e-4)
    assert least_overlap(0.692, 0.435) < 0


@given(st.integers(0, 2**32 - 1))
def test_no_three_features_break_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.random(300) < 0.4
    x = np.stack([base, base & (rng.random(300) < 0.7), base ^ (rng.random(300) < 0.1)])
    if x.any(axis=1).all() and not x.all(axis=1).any():
        corr = np.corrcoef(x)
        assert corr[1, 2] >= least_overlap(corr[0, 1], corr[0, 2]) - 1e-9


def test_what_is_no_phi_is_refused() -> None:
    with pytest.raises(MeasureError, match="between -1 and 1"):
        least_overlap(1.2, 0)


def test_candidates_are_listed_with_their_partners() -> None:
    """Two candidates by hand: a solo row, then its partners in their order; the third is cut."""
    frame = pd.DataFrame(
        {
            "rank": [1, 1, 2, 3], "feature": [7, 7, 4, 5], "score": 0.4, "rate": [0.1, 0.1, 0.2, 0],
            "peak": ["a", "a", "b", "c"], "partner": [3, 9, 3, 1], "phi": [0.6, 0.4, 0.5, 0.3],
            "partner_rate": [0.3, 0.9, 0.3, 0.1], "partner_peak": ["x", "y", "x", "z"],
            "overlap": [np.nan, 0.2, np.nan, np.nan], "cosine": [0.8, 0.1, 0.7, 0.0],
            "explanation": "<b>mine", "fuzz": 1.0,
            "partner_explanation": "theirs", "partner_fuzz": 0.5,
        }
    )  # fmt: skip
    shown = listed(frame, 2)
    assert shown.feature.tolist() == [7, 3, 9, 4, 3]
    assert shown.sae.tolist() == ["solo", "joint", "joint", "solo", "joint"]
    assert shown.peak.tolist() == ["`a`", "`x`", "`y`", "`b`", "`x`"]
    assert shown.explanation[0] == "`<b>mine`"
    assert shown.fuzz.tolist() == [1.0, 0.5, 0.5, 1.0, 0.5]
    assert shown.phi[shown.sae == "solo"].isna().all()
    assert shown.cosine.dropna().tolist() == [0.8, 0.1, 0.7]
    assert listed(frame[:0]).empty
