"""The paper's values are all there, as printed; the verdict's rules, case by case by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metasae_lib.show.published import (
    AGREES,
    AS_SET,
    DISAGREES,
    INCONCLUSIVE,
    MADE,
    NOT_PRINTED,
    NOT_RUN,
    OTHER_MODEL,
    SAME_DIRECTION,
    SET_OTHERWISE,
    Measured,
    load_published,
    scorecard,
    verdict,
    verdict_counts,
)
from metasae_lib.study.errors import PublishedError

HEADLINE = "gpt2-large.table1.lambda0.3-sigma1.d_mean_abs_phi_pct"


# ours, interval, verdict against a published -7.5 with tolerance 1: A = [-8.5, -6.5]
AGAINST_A_DECREASE = [
    (None, None, NOT_RUN),
    (math.nan, None, NOT_RUN),
    (math.inf, None, NOT_RUN),
    (-7.5, None, AGREES),
    (-8.5, None, AGREES),  # the ends count
    (-6.5, None, AGREES),
    (-7.0, (-9.0, -5.0), AGREES),  # wider than A, but clear of zero
    (-7.0, (-14.1, 0.1), INCONCLUSIVE),  # cannot be told from no effect
    (-7.0, (-14.0, 0.0), INCONCLUSIVE),  # touching zero is not excluding it
    (-9.0, (-10.0, -8.0), INCONCLUSIVE),  # reaches A, ours does not
    (-2.0, (-7.0, 3.0), INCONCLUSIVE),
    (-3.0, None, SAME_DIRECTION),
    (-3.0, (-4.0, -2.0), SAME_DIRECTION),
    (-12.0, (-14.0, -10.0), SAME_DIRECTION),
    (-1.0, (-2.5, 0.5), DISAGREES),  # excludes the paper's value, shows no direction
    (-1.0, (-2.0, 0.0), DISAGREES),
    (0.0, None, DISAGREES),
    (4.0, (3.0, 5.0), DISAGREES),
    (4.0, None, DISAGREES),
]


@pytest.mark.parametrize(("ours", "interval", "expected"), AGAINST_A_DECREASE)
def test_verdict_on_a_change(
    ours: float | None, interval: tuple[float, float] | None, expected: str
) -> None:
    assert verdict(-7.5, ours, interval, 1.0) == expected
    if ours is not None:  # the same world with the sign turned
        turned = interval and (-interval[1], -interval[0])
        assert verdict(7.5, -ours, turned, 1.0) == expected


@pytest.mark.parametrize(
    ("published", "ours", "interval", "tolerance", "null", "expected"),
    [
        # No effect claimed: agreement needs an interval inside A.
        (0.0, 0.2, (-0.5, 0.9), 1.0, 0.0, AGREES),
        (0.0, 0.2, (-2.0, 2.4), 1.0, 0.0, INCONCLUSIVE),
        (0.0, 3.0, (2.0, 4.0), 1.0, 0.0, DISAGREES),
        (0.5, 0.2, None, 1.0, 0.0, AGREES),
        (0.5, 3.0, (2.0, 4.0), 1.0, 0.0, DISAGREES),  # 0.5 ± 1 claims no direction
        # Another value for "no effect": 51.6% of pairs higher, half would be chance.
        (51.6, 51.5, (50.8, 52.2), 0.7, 50.0, AGREES),
        (51.6, 51.5, (49.0, 54.0), 0.7, 50.0, INCONCLUSIVE),
        (51.6, 60.0, (59.0, 61.0), 0.7, 50.0, SAME_DIRECTION),
        (51.6, 47.0, (46.0, 48.0), 0.7, 50.0, DISAGREES),
        # Values without a direction.
        (0.097, 0.0972, None, 0.0005, None, AGREES),
        (0.097, 0.12, (0.11, 0.13), 0.0005, None, DISAGREES),
        (0.097, 0.099, (0.096, 0.102), 0.0005, None, INCONCLUSIVE),
        # No tolerance at all; and floating point at the ends.
        (20.0, 20.0, None, 0.0, None, AGREES),
        (20.0, 21.0, None, 0.0, None, DISAGREES),
        (0.3, 0.1 + 0.2, None, 0.0, 0.0, AGREES),
        (2.5, 2.55, None, 0.05, 0.0, AGREES),
        (2.5, 2.45, None, 0.05, 0.0, AGREES),
    ],
)
def test_verdict_on_other_values(
    published: float,
    ours: float,
    interval: tuple[float, float] | None,
    tolerance: float,
    null: float | None,
    expected: str,
) -> None:
    assert verdict(published, ours, interval, tolerance, null) == expected


@pytest.mark.parametrize("interval", [(-3.0, -2.0), (0.0, 1.0), (2.0, -2.0)])
def test_an_interval_must_hold_its_value(interval: tuple[float, float]) -> None:
    with pytest.raises(PublishedError, match="does not hold"):
        verdict(-7.5, -1.0, interval, 1.0)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_is_not_negative(tolerance: float) -> None:
    with pytest.raises(PublishedError, match="zero or more"):
        verdict(1.0, 1.0, None, tolerance)


numbers = st.floats(-100, 100)
widths = st.floats(0, 50)


@given(numbers, numbers, widths, widths, st.floats(0, 20), st.sampled_from([None, 0.0, 50.0]))
def test_verdict_is_total_and_consistent(
    published: float, ours: float, below: float, above: float, tolerance: float, null: float | None
) -> None:
    interval = (ours - below, ours + above)
    found = verdict(published, ours, interval, tolerance, null)
    assert found in (AGREES, SAME_DIRECTION, INCONCLUSIVE, DISAGREES)
    if found == AGREES:
        assert abs(ours - published) <= tolerance + 1e-6
    if found == SAME_DIRECTION:
        assert null is not None
        assert (ours - null) * (published - null) > 0
    # A scale changes nothing.
    scaled = None if null is None else null * 4
    again = verdict(
        published * 4, ours * 4, (interval[0] * 4, interval[1] * 4), tolerance * 4, scaled
    )
    assert again == found


def leaves(tree: Any) -> list[str]:
    """Every printed value of the file: `value`s, grid columns, features' numbers, artefacts."""
    if isinstance(tree, dict):
        if "value" in tree:
            return [str(tree["where"])]
        found = [
            tree["id"] if "what" in tree else key
            for key in ("d_mean_abs_phi_pct", "d_l2_pct", "ce_pct", "fuzz", "phi", "what")
            if key in tree
        ]
        return found + [leaf for value in tree.values() for leaf in leaves(value)]
    return [leaf for item in tree for leaf in leaves(item)] if isinstance(tree, list) else []


def test_every_value_of_the_file_is_loaded() -> None:
    path = Path(__file__).parents[1] / "book" / "published.yml"
    published = load_published()
    assert published.values == load_published(path).values
    assert len(published.values) == len(leaves(yaml.safe_load(path.read_text()))) == 138
    frame = published.frame()
    assert frame["where"].str.len().min() > 0
    assert set(frame.section) == {"set-up", "result", "table 1", "case study", "artefact"}


def test_values_as_printed() -> None:
    published = load_published()
    assert published[HEADLINE] == -7.5
    assert published["gpt2-large.setup.n_features"] == 20480
    assert published["gpt2-large.n_pairs"] == 209e6
    assert published["gemma-2-9b.case.flash.joint-34102.phi"] == 0.173
    rounding = {
        HEADLINE: 0.05,
        "gpt2-large.solo_mean_abs_phi": 0.005e-3,
        "gpt2-large.phi_median": 0.5e-4,  # printed −5 × 10⁻⁴
        "gpt2-large.n_pairs": 0.5e6,  # printed ~209M
        "gpt2-large.matched_pairs": 0.5,
        "gpt2-large.l2_increase_absolute": 0.0005,  # 0.010 has three decimals
        "gpt2-large.table1.lambda0.1-sigma0.3.d_l2_pct": 0.05,  # 2.0, not 2
        "gpt2-large.case.too.joint-4741.phi": 0.0005,  # 0.710
    }
    for value_id, half_unit in rounding.items():
        assert published.values[value_id].rounding == pytest.approx(half_unit, rel=1e-12)
    words = published.values["gpt2-large.setup.sigma_sq"]
    assert (words.value, words.printed) == (None, "0.3, 1.0, 3.0")
    with pytest.raises(PublishedError, match="in words"):
        published["gpt2-large.lambda0_control"]
    with pytest.raises(PublishedError, match="no value 'nothing'"):
        published["nothing"]


def test_tolerances_name_their_origin() -> None:
    values = load_published().values
    headline = values[HEADLINE]
    # sqrt(2) · 1e-5 / 2.15e-3 = 0.658% is the scatter of a difference; twice that.
    assert headline.tolerance == pytest.approx(1.316, abs=1e-3)
    assert "seeds" in headline.tolerance_origin
    assert all(v.tolerance_origin for v in values.values())
    assert all(v.tolerance >= v.rounding for v in values.values() if v.section == "result")


def test_scorecard_lists_everything_and_compares_what_can_be() -> None:
    published = load_published()
    ours = {
        HEADLINE: Measured(-7.0, (-9.0, -5.0)),
        "gpt2-large.solo_l2": Measured(0.12),
        "gpt2-large.setup.k": Measured(32),
        "gpt2-large.setup.optimizer": Measured(words="Adam"),
        "gpt2-large.lambda0_control": Measured(words="the same", answer=AGREES),
        "gpt2-large.table1.lambda0.1-sigma0.3.ce_pct": Measured(3.0),
        "gpt2-large.welch_p_below": Measured(0.0),
        "gpt2-large.dead_solo": Measured(why_not="no memory"),
        "artefact.figure-1a": Measured(words="table figure_1a"),
    }
    here = scorecard(published, ours, "gpt2-large").set_index("id")
    assert list(here.index) == list(published.values)
    assert here.loc[HEADLINE, "verdict"] == AGREES
    assert here.loc[HEADLINE, "difference"] == pytest.approx(0.5)
    assert here.loc["gpt2-large.solo_l2", "verdict"] == DISAGREES
    assert here.loc["gpt2-large.setup.k", "verdict"] == SET_OTHERWISE
    assert here.loc["gpt2-large.setup.optimizer", "verdict"] == AS_SET
    assert here.loc["gpt2-large.lambda0_control", "verdict"] == AGREES
    assert here.loc["gpt2-large.table1.lambda0.1-sigma0.3.ce_pct", "verdict"] == NOT_PRINTED
    assert here.loc["gpt2-large.welch_p_below", "verdict"] == AGREES
    assert here.loc["gpt2-large.dead_solo", "verdict"] == "not run: no memory"
    assert here.loc["gpt2-large.dead_solo", "group"] == NOT_RUN
    assert here.loc["artefact.figure-1a", "verdict"] == MADE
    assert here.loc["gpt2-large.phi_max", "verdict"].startswith(NOT_RUN + ": ")

    # Another model: a change can agree, an absolute value cannot be compared.
    there = scorecard(published, ours, "smollm2-135m").set_index("id")
    assert there.loc[HEADLINE, "verdict"] == AGREES
    assert there.loc["gpt2-large.solo_l2", "verdict"] == OTHER_MODEL
    with pytest.raises(PublishedError, match="no value 'else'"):
        scorecard(published, {"else": Measured(1.0)}, "gpt2-large")


def test_counts_at_half_once_and_twice_the_tolerance() -> None:
    # 0.9 above the printed -7.5: outside half of 1.316, inside once and twice.
    ours = {HEADLINE: Measured(-6.6)}
    counts = verdict_counts(load_published(), ours, "gpt2-large").set_index("verdict")
    assert list(counts.columns) == ["0.5 × tolerance", "1 × tolerance", "2 × tolerance"]
    assert list(counts.loc[AGREES]) == [0, 1, 1]
    assert list(counts.loc[SAME_DIRECTION]) == [1, 0, 0]
    assert counts.sum().nunique() == 1


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PublishedError, match="No such file"):
        load_published(tmp_path / "published.yml")
    (tmp_path / "other.yml").write_text("setup: 3\n")
    with pytest.raises(PublishedError, match="not the paper's value file"):
        load_published(tmp_path / "other.yml")
    monkeypatch.setattr("metasae_lib.show.published.repository_folders", lambda name: [])
    with pytest.raises(PublishedError, match="inside the repository"):
        load_published()
