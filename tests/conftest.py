"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from metasae_lib import Profile, Run


@pytest.fixture
def tiny() -> Profile:
    """The profile `tiny` as it is."""
    return Profile.load("tiny")


@pytest.fixture
def run(tiny: Profile, tmp_path: Path) -> Run:
    """A fresh run of `tiny` in a folder of its own."""
    return Run.open(tiny, tmp_path / "runs")
