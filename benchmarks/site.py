"""What a book costs to render and to open: python benchmarks/site.py [--profile tiny]

Renders the book of one finished run into a temporary folder and opens every page from disk in
headless Chromium; then opens an explorer of 4,096 features in each of --arms arms (default 6),
whose contexts are drawn from the run's own text. Needs `make test`'s packages and a finished run
of the profile (`make book PROFILES=tiny`). Ends with `ratio: <goal over ours, the worst goal>`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from playwright.sync_api import Page, sync_playwright

from metasae_lib import Profile, Run
from metasae_lib.interpret import Lens
from metasae_lib.interpret.examples import Example
from metasae_lib.show import explorer
from metasae_lib.subject.corpus import load_tokens

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow"))

from check_site import pages_of  # noqa: E402

N, CONTEXT, MIB = 4096, 32, 2**20
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def arm(name: str, other: str, pieces: list[str], seed: int) -> explorer.ArmPage:
    """An arm of N features with contexts of real tokens and made-up numbers."""
    rng = np.random.default_rng(seed)

    def context() -> Example:
        start, acts = int(rng.integers(len(pieces) - CONTEXT)), np.zeros(CONTEXT)
        acts[rng.integers(CONTEXT, size=3)] = rng.uniform(0.5, 9, 3)
        return Example((), tuple(pieces[start : start + CONTEXT]), tuple(acts.tolist()), start)

    def words(*shape: int) -> NDArray[np.object_]:
        return np.array(pieces, object)[rng.integers(len(pieces), size=shape)]

    columns = ["rate", "max", "threshold", "fuzz", "cosine", "phi", "split"]
    features = pd.DataFrame(rng.uniform(0, 1, (N, len(columns))), columns=columns)
    features["explanation"] = [" ".join(some) for some in words(N, 5)]
    features["partner"] = rng.permutation(N).astype(float)
    near = [[(int(i), 0.1234) for i in rng.integers(N, size=8)] for _ in range(N)]
    return explorer.ArmPage(
        name=name,
        same=[],
        other=other,
        features=features,
        tokens=words(N, 5).tolist(),
        other_tokens=words(N, 5).tolist(),
        lens=Lens(words(N, 2, 10), rng.normal(0, 5, (N, 2, 10))),
        histograms=rng.integers(0, 99, (N, 20)),
        near=near,
        cross=[pairs[:5] for pairs in near],
        contexts=[[context(), context()] for _ in range(N)],
    )


def paints(page: Page, site: Path) -> dict[str, float]:
    """Seconds to first contentful paint of every page, opened from disk."""
    found = {}
    for path in pages_of(site):
        page.goto(path.as_uri())
        page.wait_for_function(f"({PAINT}) !== null")
        found[str(path.relative_to(site))] = page.evaluate(PAINT) / 1000
    return found


def open_explorer(page: Page, folder: Path, arms: int, pieces: list[str]) -> tuple[float, float]:
    """Seconds until the explorer shows a feature's card, and the MiB of its data."""
    names = [f"arm{i}" for i in range(arms)]
    pages = [arm(n, names[(i + 1) % arms], pieces, i) for i, n in enumerate(names)]
    sizes = explorer.write(folder, pages, "large", "", "index.html")
    started = time.perf_counter()
    page.goto(f"{(folder / 'index.html').as_uri()}#arm=arm1&feature=4000")
    page.wait_for_function("document.documentElement.dataset.ready === location.hash")
    return time.perf_counter() - started, sum(sizes.values()) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--arms", type=int, default=6)
    options = parser.parse_args()
    tokens = load_tokens(Run.open(Profile.load(options.profile), REPOSITORY / "runs"))
    pieces = [tokens.tokenizer.decode([int(i)]) for i in tokens.rows("contexts")[:100].ravel()]
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder, started = Path(name), time.perf_counter()
        book = [sys.executable, "workflow/book.py", options.profile, "--output", name]
        subprocess.run(book, cwd=REPOSITORY, check=True)
        rendered, site = time.perf_counter() - started, folder / "_build" / "html"
        size = sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) / MIB
        largest = max(p.stat().st_size for p in pages_of(site)) / MIB
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        painted = paints(page, site)
        opened, data = open_explorer(page, folder / "explorer", options.arms, pieces)
        browser.close()
    slowest = max(painted, key=lambda key: painted[key])
    rows = [
        ("book from finished notebooks (s)", rendered, 60),
        ("whole site (MiB)", size, 40),
        ("largest page (MiB)", largest, 3),
        (f"first paint, slowest page: {slowest} (s)", painted[slowest], 1),
        (f"explorer, {N:,} features x {options.arms} arms, {data:.0f} MiB (s)", opened, 2),
    ]
    for what, ours, goal in rows:
        print(f"{what:<70} {ours:8.2f}   goal {goal}")
    print(f"ratio: {min(goal / ours for _, ours, goal in rows):.2f}")


if __name__ == "__main__":
    main()
