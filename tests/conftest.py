"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright
from small_hub import SmallHub

from metasae_lib import Profile, Run


@pytest.fixture
def tiny() -> Profile:
    """The profile `tiny` as it is."""
    return Profile.load("tiny")


@pytest.fixture
def run(tiny: Profile, tmp_path: Path) -> Run:
    """A fresh run of `tiny` in a folder of its own."""
    return Run.open(tiny, tmp_path / "runs")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty METASAE_CACHE."""
    monkeypatch.setenv("METASAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub of our own in the place of Hugging Face's."""
    import datasets
    from huggingface_hub import constants

    with SmallHub().serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(own_cache / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
        yield served


@pytest.fixture(scope="session")
def program() -> Iterator[Browser]:
    """Headless Chromium of the system; Playwright brings its driver, not a browser."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "Pages are tested in a browser, and there is none: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def chromium(program: Browser) -> Iterator[Page]:
    """A fresh page without a network."""
    context = program.new_context(offline=True, viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def serious(page: Page) -> list[str]:
    """What axe-core calls serious or critical on the page: rule, advice and the first element."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']} ({len(one['nodes'])}×, {one['nodes'][0]['html'][:120]})"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
