"""The announced claims: each is one row of one table, and its verdict follows from the interval."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_report import fill

from metasae_lib import Profile, Run
from metasae_lib.show import run_scorecard
from metasae_lib.study.kept import kept_runs

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import announced  # noqa: E402
import landing  # noqa: E402
import together  # noqa: E402
from citation import Citation  # noqa: E402

CLAIMS: dict[str, Any] = yaml.safe_load((REPOSITORY / "book" / "claims.yml").read_text())
EACH = [(name, claim) for name, part in CLAIMS["runs"].items() for claim in part["claims"]]
EFFECTS = {"what": "mean |φ|, %", "against": "solo", "says": "lower", "table": "effects",
           "row": {"way": "seeds"}, "value": ["change_pct", "low", "high"]}  # fmt: skip


@pytest.mark.parametrize(
    ("says", "low", "high", "verdict"),
    [
        ("lower", -2, -1, announced.FOR),
        ("lower", 1, 2, announced.AGAINST),
        ("higher", 1, 2, announced.FOR),
        ("higher", -2, -1, announced.AGAINST),
        ("lower", -1, 1, announced.OPEN),
        ("higher", 0, 1, announced.OPEN),
        ("higher", np.nan, np.nan, announced.NOTHING),
    ],
)
def test_which_way_an_interval_speaks(says: str, low: float, high: float, verdict: str) -> None:
    assert announced.judged(says, low, high) == verdict


def test_every_claim_is_one_row_of_a_table_that_a_notebook_saves() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "notebooks").glob("*.py"))
    saved = set(re.findall(r'save_table\("(\w+)"', sources))
    kept, looked_at = {run.name: run for run in kept_runs(REPOSITORY / "results")}, 0
    for name, claim in EACH:
        assert claim["table"] in saved and claim["says"] in ("lower", "higher")
        before = kept.get(CLAIMS["runs"][name]["seen_in"])
        if before is not None and before.has_table(claim["table"]):
            found = announced.found(before, claim)
            assert found is not None, claim
            change, low, high, n_seeds = found
            assert low <= change <= high or (n_seeds == 0 and np.isnan([low, change, high]).all())
            looked_at += 1
    assert looked_at >= 10


def _run(tmp_path: Path, name: str, change: float, reach: float, n_seeds: int) -> Run:
    run = Run.open(Profile.load(name), tmp_path)
    row = ("seeds", change, change - reach, change + reach, n_seeds)
    columns = ["way", "change_pct", "low", "high", "n_seeds"]
    run.save_table("effects", pd.DataFrame([row], columns=columns), "made up")
    return run


def test_a_run_counts_only_as_it_was_announced(tmp_path: Path) -> None:
    """The page says how far the interval will reach, and shows what is found once it is made."""
    seen = _run(tmp_path, "smollm2-135m", -2.0, 1.0, 4)
    made = _run(tmp_path, "smollm2-135m-reference", -3.0, 0.5, 6)
    section = {"seen_in": seen.name, "claims": [EFFECTS]}
    claims = {"announced": {}, "runs": {made.name: section}}
    profiles = {made.name: made.profile}
    where = Citation(REPOSITORY)
    before = announced.page(claims, profiles, {seen.name: seen}, where)
    # t at 5 degrees of freedom is 2.571, at 3 it is 3.182: 2.571/√6 over 3.182/√4.
    assert "Not announced yet" in before and "± 0.66" in before and announced.NOT_MADE in before
    after = announced.page(claims, profiles, {seen.name: seen, made.name: made}, where)
    assert "−3 (−3.5 to −2.5)" in after and announced.FOR in after
    beyond = EFFECTS | {"row": {"way": "frontier"}}  # a row that the run does not have
    claims["runs"][made.name] = section | {"claims": [beyond]}
    after = announced.page(claims, profiles, {made.name: made}, where)
    assert announced.NOTHING in after and announced.NOT_MADE not in after
    larger = Profile.load(made.name, {"text.roles.scan": 900_000})
    other = announced.page(claims, {made.name: larger}, {made.name: made}, where)
    assert announced.NOT_MADE in other


def test_which_runs_are_silent() -> None:
    """The one that a run was announced from, unless announced itself; the one that it repeats."""
    more = {"seen_in": "a", "repeats": "b"}
    claims = {"runs": {"a": {"seen_in": "small"}, "b": {"seen_in": "a"}, "c": more}}
    assert announced.answered_for(claims, []) == set()
    assert announced.answered_for(claims, ["b"]) == {"a"}
    assert announced.answered_for(claims, ["a", "b"]) == {"small"}
    assert announced.answered_for(claims, ["a", "b", "c"]) == {"small", "b"}


def test_an_announced_run_answers_for_the_smaller_one(tmp_path: Path) -> None:
    """On the first page and in tables of values; what the smaller finds stands below as before."""
    reference = fill(Run.open(Profile.load("smollm2-135m-reference"), tmp_path / "runs"))
    default = fill(Run.open(Profile.load("smollm2-135m"), tmp_path / "runs"))
    for run in (reference, default):
        run.save_table("scorecard", run_scorecard(run), "made up")
    runs = {run.name: run for run in (reference, default)}
    published = yaml.safe_load((REPOSITORY / "book" / "published.yml").read_text())
    landing.write(published, runs, tmp_path, Citation(REPOSITORY), {default.name})
    compared = pd.read_csv(tmp_path / "answer.csv").comparison
    assert len(compared) and compared.str.startswith(f"{reference.name}: ").all()
    assert "smollm2-135m/index.md" in (tmp_path / "findings.md").read_text()
    together.write(runs, tmp_path, REPOSITORY / "notebooks", Citation(REPOSITORY), {default.name})
    columns = pd.read_csv(tmp_path / "together" / "fidelity.csv").columns.tolist()
    assert columns[3:] == [reference.name, f"{reference.name}: verdict"]
    page = (tmp_path / "together" / "fidelity.md").read_text()
    assert f"tab-item}} {default.name}" in page
    # Reasons are long, and columns of several runs narrow: they stand in the data.
    assert "| not run |" in page and "not run:" not in page
    assert "not run: " in (tmp_path / "together" / "fidelity.csv").read_text()
