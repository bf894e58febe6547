"""Kept runs: a run's small tables and values under `results/`, read as the run itself is.

`results/<run>/` holds `tables/`, `values/` and `profile.yml` as the run has them, their hashes in
`manifest.json`, and the same for machines in `ro-crate-metadata.json`. What took hours, or another
machine, is in the book without being run again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from metasae_lib.study.crate import describe
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.files import make_folder, sha256_of, write_json
from metasae_lib.study.profile import Profile
from metasae_lib.study.run import Run

LIMIT = 64 * 2**10  # bytes of a table that is kept
_ROUNDING = 1e-6  # relative difference that another machine's sums may make
_CLOCKS = {"seconds", "time"}  # columns and tables that no two runs have alike


class KeptRun(Run):
    """A run as `keep` has stored it. Raises `ArtefactError` if a file of it was edited or lost."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder).absolute()
        manifest = self._read(folder / "manifest.json")
        super().__init__(_profile(folder), folder.parent)
        self.name, self.folder = folder.name, folder
        self.profile_hash = str(manifest.get("profile_hash"))
        for name, sha256 in manifest.get("files", {}).items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != sha256:
                raise ArtefactError(
                    f"{path} was edited or lost since it was kept: get it back from the "
                    f"repository, or keep the run anew with make keep"
                )
        self._origin: dict[str, Any] = manifest["made"]

    def save_table(self, name: str, frame: pd.DataFrame, about: str) -> Path:
        """Nothing is saved: a kept run stays as it is. The path of what is kept."""
        return self._path("table", name)

    def save_json(self, name: str, value: object) -> Path:
        """Nothing is saved, as for tables."""
        return self._path("value", name)

    def provenance(self) -> dict[str, Any]:
        """Where the kept results come from: date, hardware, commit and so on of the run."""
        return self._origin


def kept_runs(results: Path) -> Iterator[KeptRun]:
    """The kept runs of a folder, by name."""
    for manifest in sorted(results.glob("*/manifest.json")):
        yield KeptRun(manifest.parent)


def keep(folder: str | os.PathLike[str], results: str | os.PathLike[str] = "results") -> Path:
    """Store the small tables and the values of a run under `results`; returns their folder.

    folder: of the run, made here or on another machine. Raises `ArtefactError` if its notebooks
    have not all been run, if a file does not have the hash or the profile that its record says, or
    if a number is infinite; nothing is stored then.
    """
    folder = Path(folder).absolute()
    run = Run(_profile(folder), folder.parent)
    run.folder = folder
    tables = [path for path in _tables(run) if path.stat().st_size <= LIMIT]
    for path in tables:
        frame = run.load_table(path.stem)
        if np.isinf(frame.select_dtypes("number")).any(axis=None):
            raise ArtefactError(f"{path} holds an infinite number: find out why before keeping it")
    last = "synthsaebench" if run.profile.synthetic else "scorecard"
    if not run.has_table(last):
        raise ArtefactError(
            f"run {folder.name} has no table {last} yet: run its notebooks to the end"
        )
    target = Path(results) / folder.name
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for name in ("tables", "values"):
        make_folder(new / name)
    copied = [file for path in tables for file in (path, path.with_suffix(".json"))]
    for path in [*copied, *sorted((run.folder / "values").glob("[!.]*.json"))]:
        shutil.copyfile(path, new / path.relative_to(run.folder))
    shutil.copyfile(run.folder / "profile.yml", new / "profile.yml")
    made = json.loads((new / "tables" / f"{last}.json").read_text(encoding="utf-8"))
    hashes = {
        path.relative_to(new).as_posix(): sha256_of(path)
        for path in sorted(new.rglob("*"))
        if path.is_file()
    }
    manifest = {"profile_hash": run.profile_hash, "made": made, "files": hashes}
    write_json(new / "manifest.json", manifest)
    describe(new, run.profile.about)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(new, target)
    return target


def agreement(fresh: Run, kept: Run) -> pd.DataFrame:
    """How a fresh run's tables stand to the kept ones of the same profile, one row a table.

    Columns: table, agreement ("equal", "within rounding", "differs", "not in this run"), where
    (the first column that differs, and by how much at most, relative to the kept value). Seconds
    are left out.
    """
    rows = []
    for path in _tables(kept):
        name = path.stem
        if name in _CLOCKS:
            continue
        if not fresh.has_table(name):
            rows.append((name, "not in this run", ""))
            continue
        rows.append((name, *_compared(fresh.load_table(name), kept.load_table(name))))
    return pd.DataFrame(rows, columns=["table", "agreement", "where"])


def _profile(folder: Path) -> Profile:
    """The profile that a run's folder holds. Raises `ArtefactError`."""
    try:
        values = yaml.safe_load((folder / "profile.yml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArtefactError(f"{folder} is not the folder of a run: {error}") from None
    return Profile.of(values, folder.name)


def _tables(run: Run) -> list[Path]:
    return sorted((run.folder / "tables").glob("[!.]*.csv"))


def _compared(fresh: pd.DataFrame, kept: pd.DataFrame) -> tuple[str, str]:
    if list(fresh.columns) != list(kept.columns) or len(fresh) != len(kept):
        return (
            "differs",
            f"{len(fresh)} rows of {len(fresh.columns)} columns, not {len(kept)} of "
            f"{len(kept.columns)}",
        )
    found = "equal"
    for column in kept.columns.difference(list(_CLOCKS), sort=False):
        a, b = fresh[column], kept[column]
        if a.equals(b):
            continue
        if not (pd.api.types.is_numeric_dtype(a) and pd.api.types.is_numeric_dtype(b)):
            return "differs", column
        gap = ((a - b).abs() / b.abs().clip(lower=1e-12)).max()
        if (a.isna() != b.isna()).any() or gap > _ROUNDING:
            return "differs", f"{column}, by up to {100 * gap:.2g}%"
        found = "within rounding"
    return found, ""
