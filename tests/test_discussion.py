"""The discussion: worded by the intervals of the runs' tables, and short."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_report import fill

from metasae_lib import Profile, Run
from metasae_lib.show import frontier_points, run_scorecard
from metasae_lib.study.kept import kept_runs

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import discussion  # noqa: E402

ANNOUNCEMENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "book" / "claims.yml").read_text())
PROFILES = {name: Profile.load(name) for name in ANNOUNCEMENT["runs"]}
MOST_WORDS = 800  # numbers and all


def page(runs: list[Run]) -> str:
    by_name = {run.name: run for run in runs}
    return discussion.page(ANNOUNCEMENT, PROFILES, by_name, Profile.load("gpt2-large"))


def test_it_is_short_and_every_section_has_figures() -> None:
    """Of the runs that are kept: what the book shows."""
    text = page(list(kept_runs(REPOSITORY / "results")))
    words = text.split()
    assert 300 < len(words) <= MOST_WORDS, len(words)
    sections = text.split("## ")[1:]
    assert len(sections) == 7
    for section in sections:
        assert any(c.isdigit() for c in section.partition("\n")[2]), section
    assert not re.search(r"\bnan\b", text) and " ." not in text and " ;" not in text


def made_up(name: str, folder: Path) -> Run:
    """A run with made-up tables, in which L2 0.100 becomes 0.110."""
    run = fill(Run.open(PROFILES[name], folder))
    run.save_table("scorecard", run_scorecard(run), "made up")
    run.save_table("frontier_pairs", run.load_table("grid"), "made up")
    points = frontier_points(run, run.load_table("phi"), run.load_table("arms"))
    run.save_table("frontier", points, "made up")
    return run


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """The reference run."""
    return made_up("smollm2-135m-reference", tmp_path)


def equal_l2(run: Run, low: float, high: float) -> None:
    """Give the run a change of mean |φ| at equal L2."""
    effects = run.load_table("effects")
    change = {"change_pct": (low + high) / 2, "low": low, "high": high, "n_seeds": 6}
    rows = pd.DataFrame([{"way": way} | change for way in ("frontier", "excess")])
    run.save_table("effects", pd.concat([effects, rows]), "made up")


@pytest.mark.parametrize(
    ("low", "high", "says", "less", "more"),
    [(-3.0, -1.0, "falls", 1, 0), (1.0, 3.0, "rises", 0, 1), (-1.0, 1.0, "does not clearly", 0, 0)],
)
def test_the_interval_words_it(
    made: Run, low: float, high: float, says: str, less: int, more: int
) -> None:
    equal_l2(made, low, high)
    text = page([made])
    assert f"(a smaller k, equal L2), mean |φ| {says}" in text
    assert f"For the same L2 a smaller k lowers mean |φ| more in {more} of 1 runs." in text
    assert f"at equal L2 it falls in {less} of 1." in text
    claimed = "smollm2-135m-reference, at equal L2: mean |φ| "
    before, _, after = text.partition("**Against it:**")
    assert (claimed in before, claimed in after) == (high < 0, low > 0)
    # Made up: 0.110 / 0.100 and 0.111 / 0.101, 1.90 / 2.00 and 1.91 / 2.02 thousandths.
    assert "it falls (−5.2%;" in text and "for +10.0% of L2" in text


def test_two_runs_of_one_model_are_told_apart(made: Run, tmp_path: Path) -> None:
    longer = made_up("smollm2-135m-long", tmp_path)
    equal_l2(made, -3.0, -1.0)
    equal_l2(longer, 1.0, 3.0)
    text = page([made, longer])
    falls, rises = "falls (−2.0%; −3.0% to −1.0%)", "rises (+2.0%; +1.0% to +3.0%)"
    both = f"{falls} in {made.name} and {rises} in {longer.name}."
    assert (
        f"equal L2), mean |φ| {both} What is above the null of the same firing rates {both}" in text
    )
    assert "a smaller k lowers mean |φ| more in 1 of 2 runs." in text
    assert "at equal L2 it falls in 1 of 2." in text


def test_a_run_beyond_the_solo_curve_counts_on_no_side(made: Run, tmp_path: Path) -> None:
    longer = made_up("smollm2-135m-long", tmp_path)
    equal_l2(made, 1.0, 3.0)
    text = page([made, longer])
    assert f"{longer.name} has nothing to compare with." in text
    assert "a smaller k lowers mean |φ| more in 1 of 1 runs." in text
    assert "falls in 2 of 2 runs" in text and "at equal L2 it falls in 0 of 1." in text


def test_a_shorter_training_is_another_way_to_equal_l2(made: Run, tmp_path: Path) -> None:
    """Solo of the longer run has L2 0.100 and 0.101, of the shorter 0.120 and 0.121, joint 0.110
    and 0.111: half way, so at the mean of both runs' solo arms, seed by seed."""
    longer = made_up("smollm2-135m-long", tmp_path)
    assert "trained for less, to equal L2" not in page([made, longer])  # beyond the shorter one's
    points = made.load_table("frontier")
    solo = points.kind == "solo"
    points = points.assign(l2=points.l2 + 0.02 * solo, mean_abs=points.mean_abs - 2e-4 * solo)
    made.save_table("frontier", points, "made up")
    # Joint 1.90 and 1.91 thousandths, against 1.90 and 1.92.
    change = (0 + (1.91 - 1.92)) / 2 / 1.91
    said = "to equal L2, it does not clearly move (−0.3%; −3.6% to +3.1%) in smollm2-135m-long;"
    assert f"{100 * change:.1f}" == "-0.3" and said in page([made, longer])


def test_a_run_with_more_arms_speaks_for_the_one_that_it_repeats(made: Run, tmp_path: Path) -> None:
    longer, further = (made_up(f"smollm2-135m-{n}", tmp_path) for n in ("long", "long-k22"))
    equal_l2(further, 1.0, 3.0)
    text = page([made, longer, further])
    assert f"- {further.name}: " in text and f"{longer.name}:" not in text
    assert "falls in 2 of 2 runs" in text and "at equal L2 it falls in 0 of 1." in text
    assert f"- {longer.name}: " in page([made, longer])


def test_without_a_run_there_is_nothing_to_discuss() -> None:
    assert "make book makes the default one" in page([])
