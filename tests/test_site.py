"""The tiny book as `make test` has built it, in a real browser: every page, in both modes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import serious
from playwright.sync_api import Page

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

from check_site import check_site, pages_of  # noqa: E402

SITE = REPOSITORY / "_build" / "test" / "_build" / "html"


@pytest.fixture(scope="module")
def site() -> Path:
    assert (SITE / "index.html").exists(), "The tiny book is not built: run make test"
    return SITE


def test_the_tiny_book_is_sound(site: Path) -> None:
    assert check_site(site, REPOSITORY) == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(site: Path, chromium: Page, mode: str) -> None:
    chromium.add_init_script(f"localStorage.setItem('mode', '{mode}')")
    found: list[str] = []
    for path in pages_of(site):
        chromium.goto(path.as_uri())
        assert path.match("explorer/*/index.html") or chromium.evaluate(
            "document.documentElement.dataset.theme"
        ) == mode  # fmt: skip
        # A colour half-way through a transition is none that a reader sees.
        chromium.add_style_tag(content="* { transition: none !important }")
        found += [f"{path.relative_to(site)}: {problem}" for problem in serious(chromium)]
    assert not found, "\n".join(found)


def test_the_scorecard_filters_by_words_and_verdict(site: Path, chromium: Page) -> None:
    rows = "[...document.querySelectorAll('table.filterable tbody tr')].filter(r => !r.hidden)"
    chromium.goto((site / "tiny" / "07_scorecard.html").as_uri())
    every = chromium.evaluate(f"{rows}.length")
    chromium.get_by_label("Show rows with").press_sequentially("l2")
    some = chromium.evaluate(f"{rows}.map(r => r.textContent.toLowerCase())")
    assert 0 < len(some) < every and all("l2" in text for text in some)
    assert chromium.get_by_role("status").inner_text() == f"{len(some)} of {every} values"
    chromium.keyboard.press("Tab")  # by keyboard alone: to the choice, then to its first verdict
    if chromium.evaluate("document.activeElement.id") != "filter-verdict":
        chromium.keyboard.press("Tab")
    chromium.get_by_label("Verdict").select_option("inconclusive")
    verdicts = chromium.evaluate(f"{rows}.map(r => r.querySelector('.verdict').textContent)")
    assert all(text.startswith("inconclusive") for text in verdicts)
    chromium.get_by_role("button", name="Clear").press("Enter")
    chromium.wait_for_function(f"{rows}.length === {every}")


def test_every_artefact_of_the_paper_has_its_place_or_a_reason(site: Path, chromium: Page) -> None:
    chromium.goto((site / "tiny" / "07_scorecard.html").as_uri())
    verdicts = chromium.evaluate(
        "[...document.querySelectorAll('#tab-all-artefact-tiny tbody tr, "
        "table#tab-all-artefact-tiny tbody tr')].map(r => r.lastElementChild.textContent.trim())"
    )
    assert len(verdicts) == 15
    assert all(v == "made" or v.startswith("not run: ") for v in verdicts), verdicts


def test_the_explorer_opens_from_its_page_and_shows_a_card(site: Path, chromium: Page) -> None:
    chromium.goto((site / "tiny" / "05_case_studies.html").as_uri())
    chromium.get_by_role("link", name="Open the feature explorer of tiny").click()
    chromium.wait_for_selector("#rows tr")
    chromium.keyboard.press("j")
    chromium.wait_for_selector("#card h2")
    assert "solo-seed0, feature" in chromium.inner_text("#card h2")
    chromium.get_by_role("link", name="Back to the book").click()
    chromium.wait_for_url("**/tiny/05_case_studies.html")


def test_a_point_of_figure_1b_leads_to_its_row_and_its_features(site: Path, chromium: Page) -> None:
    chromium.goto((site / "tiny" / "03_cooccurrence.html").as_uri())
    points = chromium.locator("#fig-1b-tiny .points button")
    arms = points.evaluate_all("points => points.map(point => point.dataset.arm)")
    assert arms.count("") == 9 and "joint-lambda0.3-sigma1" in arms  # the paper's nine are no arms
    chromium.locator("#fig-1b-tiny .points button[tabindex='0']").focus()
    for _ in range(arms.index("joint-lambda0.3-sigma1")):
        chromium.keyboard.press("ArrowRight")
    chromium.keyboard.press("Enter")
    panel = chromium.get_by_role("status").filter(has_text="joint-lambda0.3-sigma1: mean |φ|")
    assert "L2" in panel.inner_text()
    ringed = "[...document.querySelectorAll('.points [aria-pressed=true]')].map(b => b.dataset.arm)"
    seeds = [f"joint-lambda0.3-sigma1-seed{seed}" for seed in (0, 1)]
    assert sorted(chromium.evaluate(ringed)) == sorted(["joint-lambda0.3-sigma1", *2 * seeds])
    rows = "[...document.querySelectorAll('tr.picked')].map(row => row.cells[0].textContent)"
    # Its arms in the table of φ, and itself beside the penalty's competitors.
    assert chromium.evaluate(rows) == [*seeds, "joint-lambda0.3-sigma1"]
    panel.get_by_role("link", name="Its row").click()
    chromium.wait_for_function("location.hash === '#row-joint-lambda0.3-sigma1'")
    assert serious(chromium) == []
    panel.get_by_role("link", name="Its features").click()
    chromium.wait_for_selector("#card h2")
    assert "joint-lambda0.3-sigma1-seed0, feature" in chromium.inner_text("#card h2")


def test_figure_1b_is_a_picture_without_its_script_and_in_print(site: Path, chromium: Page) -> None:
    page = (site / "tiny" / "03_cooccurrence.html").as_uri()
    points = chromium.locator("#fig-1b-tiny .points button")
    chromium.goto(page)
    points.first.wait_for()
    chromium.emulate_media(media="print")
    assert not points.first.is_visible() and chromium.locator("#fig-1b-tiny img").is_visible()
    chromium.route("**/points.js*", lambda route: route.abort())
    chromium.goto(page)
    assert points.count() == 0 and chromium.locator("#fig-1b-tiny img").is_visible()
