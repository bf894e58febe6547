"""Runs on disk: the only builder of paths, content-addressed artefacts, tables, provenance.

An artefact's folder is named by the key of what made it, so runs of different overrides share
what they have in common, and a change makes only what is new.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from metasae_lib.study import files
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.files import repository_folders, sha256_of, to_json
from metasae_lib.study.machine import made_with
from metasae_lib.study.profile import Profile

K = TypeVar("K", bound=Hashable)
_SAVED = {"table": "tables/{}.csv", "value": "values/{}.json"}


class Artefact:
    """One content-addressed folder of files; complete once `artefact.json` is written.

    Use: `with a.lock(): if not a.complete: ...write into a.folder...; a.finish()`.
    """

    _given = 0.0  # seconds that the finished artefacts of this process were given

    def __init__(
        self, artefacts: Path, stage: str, inputs: Mapping[str, Any], version: int
    ) -> None:
        self.stage, self.version, self.inputs = stage, version, json.loads(to_json(inputs))
        self.key = artefact_key(stage, self.inputs, version)
        self.folder = artefacts / f"{stage}-{self.key}"
        self._started = self._clock()
        self._checked = False
        files.make_folder(self.folder)

    @property
    def complete(self) -> bool:
        """True if finished and unharmed; False if never finished; `ArtefactError` if harmed."""
        if self._checked or not (self.folder / "artefact.json").exists():
            return self._checked
        for name, recorded in self._read()["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise self._harmed(name, "is missing")
            size = path.stat().st_size
            if size != recorded["size"]:
                raise self._harmed(name, f"has {size:,} bytes instead of {recorded['size']:,}")
            if "sha256" in recorded and sha256_of(path) != recorded["sha256"]:
                raise self._harmed(name, "was changed after it was made")
        self._checked = True
        return True

    @property
    def info(self) -> dict[str, Any]:
        """What `finish` wrote. Raises `ArtefactError` on an unfinished artefact."""
        if not self.complete:
            raise ArtefactError(f"{self.folder.name} is not finished: run the step that makes it")
        return self._read()

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Declare the folder's files final: sizes, hashes and provenance, written last.

        The entries of `extra` stand beside the others in `info`. `seconds` counts from the
        opening of the lock, less what other artefacts of the process were given since: of those
        that one pass makes the first gets all of it, and their sum is right. A stage that resumes
        may give its own total in `extra`.
        """
        for left_over in self.folder.rglob(".*.tmp*"):
            left_over.unlink()
        seconds = self._clock() - self._started
        Artefact._given += seconds
        info = {
            "stage": self.stage,
            "key": self.key,
            "version": self.version,
            "inputs": self.inputs,
            "files": {
                path.relative_to(self.folder).as_posix(): files.file_record(path)
                for path in self.folder.rglob("*")
                if path.is_file() and path.name != "artefact.json"
            },
            "seconds": round(seconds, 3),
        }
        files.write_json(self.folder / "artefact.json", info | made_with() | dict(extra or {}))
        self._checked = True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the artefact alone, waiting for whoever is making it; freed when a process dies.

        Not re-entrant: a second lock of the same artefact in one process waits for ever.
        """
        path = self.folder.with_name(f"{self.folder.name}.lock")
        try:
            file = path.open("w")
        except PermissionError:
            raise files.may_not_write(path) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._started, self._checked = self._clock(), False
            files.make_folder(self.folder)
            yield

    def _clock(self) -> float:
        """Seconds that were given to no artefact, so that none is counted twice."""
        return time.monotonic() - Artefact._given

    def _read(self) -> dict[str, Any]:
        try:
            info = json.loads((self.folder / "artefact.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._harmed("artefact.json", "cannot be read") from None
        known = isinstance(info, dict) and isinstance(info.get("files"), dict)
        if not known or info.get("key") != self.key:
            raise self._harmed("artefact.json", "belongs to something else")
        return dict(info)

    def _harmed(self, name: str, what: str) -> ArtefactError:
        return ArtefactError(
            f"{self.folder / name} {what}: delete {self.folder.name} and run again"
        )


@contextmanager
def locked(artefacts: Iterable[Artefact]) -> Iterator[None]:
    """Hold several artefacts at once, always in one order, so that processes never cross."""
    with ExitStack() as locks:
        for artefact in sorted(artefacts, key=lambda artefact: artefact.folder.name):
            locks.enter_context(artefact.lock())
        yield


class Run:
    """One profile, overrides included, on disk.

    Open it with `Run.open`; the bare constructor names the paths without making anything. `held`:
    what a process makes once and hands on, such as the language model.
    """

    def __init__(self, profile: Profile, runs_dir: str | os.PathLike[str] = "runs") -> None:
        self.profile = profile
        self.runs_dir = Path(runs_dir).absolute()
        self.name = "-".join(filter(None, [profile.name, profile.overrides_hash]))
        self.profile_hash = profile.hash
        self.folder = self.runs_dir / self.name
        self.held: dict[str, Any] = {}

    @classmethod
    def open(cls, profile: Profile, runs_dir: str | os.PathLike[str] = "runs") -> Run:
        """Open the run of a profile, making its folder on first use.

        When the profile's file was edited since, the resolved copy is renewed, and tables of the
        older one count as missing.
        """
        run = cls(profile, runs_dir)
        for folder in ("tables", "values", "notebooks", "logs", "artefacts"):
            files.make_folder(run.folder / folder)
        resolved = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True)
        path = run.folder / "profile.yml"
        if not path.exists() or path.read_text(encoding="utf-8") != resolved:
            for marker in (run.folder / "artefacts").iterdir():
                marker.unlink(missing_ok=True)
            with files.atomic_write(path) as temporary:
                temporary.write_text(resolved, encoding="utf-8")
        return run

    def artefact(self, stage: str, inputs: Mapping[str, Any], version: int = 1) -> Artefact:
        """The artefact of a stage, keyed by its inputs (JSON) and by the stage's version."""
        artefact = Artefact(self.runs_dir / "artefacts", stage, inputs, version)
        # Empty files remember what the run stands on, for its provenance.
        marker = self.folder / "artefacts" / artefact.folder.name
        if not marker.exists():
            with files.atomic_write(marker) as temporary:
                temporary.touch()
        return artefact

    def made(
        self,
        stage: str,
        inputs: Mapping[K, Mapping[str, Any]],
        version: int,
        make: Callable[[dict[K, Artefact]], None],
    ) -> dict[K, Artefact]:
        """The finished artefacts of a stage, one for each of the inputs, under the same keys.

        Those that are missing are given to `make`, all at once and locked, which finishes them;
        it is not called if there are none.
        """
        artefacts = {key: self.artefact(stage, each, version) for key, each in inputs.items()}
        with locked(artefacts.values()):
            missing = {key: one for key, one in artefacts.items() if not one.complete}
            if missing:
                make(missing)
        return artefacts

    def save_table(self, name: str, frame: pd.DataFrame, about: str) -> Path:
        """Write `tables/<name>.csv` (without the index) and its provenance beside it."""
        path = self._path("table", name)
        with files.atomic_write(path) as temporary:
            frame.to_csv(temporary, index=False)
            # A bare carriage return, which Python below 3.13 does not quote, would end the row.
            if b"\r" in temporary.read_bytes():
                frame.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)
        about_table = {
            "table": name,
            "about": about,
            "rows": len(frame),
            "columns": [str(column) for column in frame.columns],
            "sha256": sha256_of(path),
        }
        files.write_json(path.with_suffix(".json"), about_table | self.provenance())
        return path

    def load_table(self, name: str) -> pd.DataFrame:
        """Read a table. `ArtefactError` if it is missing, harmed, or of an older profile."""
        path, record = self._saved("table", name)
        if sha256_of(path) != record["sha256"]:
            raise ArtefactError(f"{path} was changed after it was made: {_who_saves(name)}")
        # Only an empty cell is missing: "null" and "None" are words.
        return pd.read_csv(path, keep_default_na=False, na_values=[""])

    def table_record(self, name: str) -> dict[str, Any]:
        """What is recorded of a table: its provenance and what it is about. `ArtefactError`."""
        return self._saved("table", name)[1]

    def has_table(self, name: str) -> bool:
        """True if the table exists and was made with the profile as it is now."""
        return self._is_current(self._path("table", name))

    def save_json(self, name: str, value: object) -> Path:
        """Write a small value to `values/<name>.json`, with its provenance. NaN becomes null."""
        path = self._path("value", name)
        files.write_json(path, {"value": value} | self.provenance())
        return path

    def load_json(self, name: str) -> Any:
        """Read back what `save_json` wrote; `ArtefactError` as for tables."""
        return self._saved("value", name)[1]["value"]

    def provenance(self) -> dict[str, Any]:
        """Where a result comes from. `run_seconds`: time spent making the run's artefacts."""
        used = self._used()
        tokens = [info["hashes"] for info in used if info["stage"] == "tokens" and "hashes" in info]
        return made_with() | {
            "profile": self.profile.name,
            "profile_hash": self.profile_hash,
            "run": self.name,
            "overrides": self.profile.overrides,
            "seeds": {"text": self.profile.text.seed, "training": self.profile.training.seeds},
            "token_hashes": tokens[-1] if tokens else None,
            "run_seconds": round(sum(info["seconds"] for info in used), 1),
        }

    def write_manifest(self) -> Path:
        """Write `manifest.json`: hashes of tables and values, the same for the same results."""
        tables, values = (
            list(filter(self._is_current, self.folder.glob(pattern.format("[!.]*"))))
            for pattern in _SAVED.values()
        )
        hashes = {
            "profile_hash": self.profile_hash,
            "tables": {table.stem: sha256_of(table) for table in tables},
            "values": {value.stem: _sha256(self._read(value)["value"]) for value in values},
        }
        path = self.folder / "manifest.json"
        files.write_json(path, hashes)
        return path

    def stages(self) -> list[tuple[str, float]]:
        """(stage, seconds spent making it) of every finished artefact of the run."""
        return [(info["stage"], info["seconds"]) for info in self._used()]

    def _used(self) -> list[dict[str, Any]]:
        """What is recorded of every finished artefact that the run has asked for."""
        names = sorted(marker.name for marker in (self.folder / "artefacts").glob("[!.]*"))
        paths = [self.runs_dir / "artefacts" / name / "artefact.json" for name in names]
        return [self._read(path) for path in paths if path.exists()]

    def _path(self, kind: str, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ArtefactError(
                f"'{name}' cannot name a file: use letters, digits, '.', '_' and '-'"
            )
        return self.folder / _SAVED[kind].format(name)

    def _saved(self, kind: str, name: str) -> tuple[Path, dict[str, Any]]:
        path = self._path(kind, name)
        if not self._is_current(path):
            raise ArtefactError(
                f"run {self.name} has no {kind} '{name}' for this profile: {_who_saves(name)}"
            )
        return path, self._read(path.with_suffix(".json"))

    def _is_current(self, path: Path) -> bool:
        """Whether a table or a value is there, and of the profile as it is now."""
        record = path.with_suffix(".json")
        made = path.exists() and record.exists()
        return made and self._read(record).get("profile_hash") == self.profile_hash

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise ArtefactError(f"{path} cannot be read: delete it and run again")
        return content


def artefact_key(stage: str, inputs: Mapping[str, Any], version: int) -> str:
    """What ends the name of an artefact's folder: a hash of what it is made from."""
    return _sha256({"stage": stage, "version": version, "inputs": inputs})[:16]


def _sha256(value: object) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def _who_saves(name: str) -> str:
    """Which notebook makes a table or value, found by its own call."""
    call = re.compile(rf"""save_(table|json)\(\s*["']{re.escape(name)}["']""")
    for folder in repository_folders("notebooks"):
        for path in sorted(folder.glob("*.py")):
            if call.search(path.read_text(encoding="utf-8")):
                return f"run the notebook {path.stem} first"
    return "run the notebook that saves it first"
