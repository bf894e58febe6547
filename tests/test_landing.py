"""The first page and the pages of all profiles, from fresh runs and from kept ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import fill

from metasae_lib import Profile, Run
from metasae_lib.show import in_short, run_scorecard
from metasae_lib.show.scorecard import saved_scorecard, scorecard_rows
from metasae_lib.show.sentences import answer
from metasae_lib.study.kept import KeptRun, keep

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

import landing  # noqa: E402
import together  # noqa: E402
from citation import Citation  # noqa: E402

WHERE = Citation(REPOSITORY)


@pytest.fixture
def fresh(tmp_path: Path) -> Run:
    run = fill(Run.open(Profile.load("smollm2-135m"), tmp_path / "runs"))
    phi = run.load_table("phi").assign(alive=2048)
    run.save_table("phi", phi, "made up")
    card = run_scorecard(run)
    run.save_table("scorecard", card, "made up")
    run.save_json("headline", in_short(run, card))
    return run


@pytest.fixture
def kept(fresh: Run, tmp_path: Path) -> KeptRun:
    return KeptRun(keep(fresh.folder, tmp_path / "results"))


@pytest.fixture
def published() -> Any:
    return yaml.safe_load((REPOSITORY / "book" / "published.yml").read_text())


def test_a_scorecard_is_read_back_as_it_was(fresh: Run) -> None:
    """Numbers and words alike, as a reader sees them."""
    made, read = run_scorecard(fresh), saved_scorecard(fresh)
    assert scorecard_rows(read).equals(scorecard_rows(made))


def test_the_first_page_answers(fresh: Run, published: Any, tmp_path: Path) -> None:
    landing.write(published, {fresh.name: fresh}, tmp_path, WHERE)
    answer = (tmp_path / "answer.md").read_text()
    assert answer.startswith("**In smollm2-135m mean |φ| falls under joint training (−5.2%, ")
    assert ", with nothing to compare with at equal L2.**" in answer  # nothing is made up for that
    assert (tmp_path / landing.PICTURE).stat().st_size > 10_000
    claims = (tmp_path / "claims.md").read_text()
    assert "{bdg-success}`smollm2-135m: agrees`" in claims
    assert "{bdg-dark}`smollm2-135m: inconclusive`" in claims
    assert "{bdg-light}`smollm2-135m: not judged`" in claims
    assert "[smollm2-135m](smollm2-135m/index.md)" in (tmp_path / "findings.md").read_text()


def test_a_toy_answers_nothing(run: Run, published: Any, tmp_path: Path) -> None:
    landing.write(published, {run.name: fill(run)}, tmp_path, WHERE)
    assert "can answer yet" in (tmp_path / "answer.md").read_text()
    assert not (tmp_path / landing.PICTURE).exists()


def test_kept_runs_stand_beside_fresh_ones_and_are_marked(
    kept: KeptRun, published: Any, tmp_path: Path
) -> None:
    (tmp_path / "generated").mkdir()
    landing.write(published, {kept.name: kept}, tmp_path / "generated", WHERE)
    assert "falls under joint training" in (tmp_path / "generated" / "answer.md").read_text()
    found = (tmp_path / "generated" / "findings.md").read_text()
    mark = landing.kept_mark(kept)
    assert mark in found and mark.startswith("kept run of 20") and "commit" in mark
    together.write({kept.name: kept}, tmp_path, REPOSITORY / "notebooks", WHERE)
    page = (tmp_path / "together" / "co-occurrence.md").read_text()
    assert mark in page and "smollm2-135m: verdict" in page
    assert (tmp_path / "together" / "co-occurrence-effects-smollm2-135m.png").exists()


def test_the_readme_says_what_the_run_of_its_picture_found() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (folder,) = re.findall(r"\((results/[^/]+)/effect\.png\)", readme)
    said = answer(KeptRun(REPOSITORY / folder))
    assert f"**{said[0].upper()}{said[1:]}.**" in " ".join(readme.split())


def test_a_fresh_run_is_held_against_the_kept_one(fresh: Run, kept: KeptRun) -> None:
    same = landing.agreement_sentence(fresh, kept)
    assert "kept in `results/`" in same and "equal" in same and "differs" not in same
    arms = fresh.load_table("arms")
    fresh.save_table("arms", arms.assign(l2=arms.l2 * 1.1), "another machine")
    moved = landing.agreement_sentence(fresh, kept)
    assert "1 differs: `arms` (l2, by up to 10%)" in moved
    assert landing.agreement_sentence(fresh, None) == ""
