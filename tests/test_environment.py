"""The one list of dependencies, its lock and the conda file say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==") for line in (ROOT / "requirements.lock").read_text().split()
    )
}
NAMED_BY_THE_USER = (
    "jupyter-book jupytext torch transformer-lens datasets matplotlib seaborn scipy papermill"
)


def requirements() -> list[Requirement]:
    listed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    return [Requirement(line) for line in listed]


def test_lock_pins_every_dependency_within_its_range() -> None:
    assert set(NAMED_BY_THE_USER.split()) <= {canonicalize_name(r.name) for r in requirements()}
    for requirement in requirements():
        version = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_lock_is_portable() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+", line), line


def test_conda_file_installs_the_lock_and_nothing_else() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert sorted(pip) == ["--editable .", "--requirement requirements.lock"]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    python = next(entry for entry in conda if entry.startswith("python=")).split("=")[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{python}.0")
