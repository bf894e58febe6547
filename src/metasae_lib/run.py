"""Runs on disk: the only builder of paths, content-addressed artefacts, tables, provenance.

An artefact's folder is named by the key of what made it, so runs of different overrides share
what they have in common, and a change makes only what is new.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from metasae_lib.errors import ArtefactError
from metasae_lib.profile import Profile, repository_folders

HASH_LIMIT = 64 * 2**20  # larger files are checked by size alone
_LIBRARIES = (
    "metasae-lib", "torch", "transformers", "transformer_lens", "numpy", "numba", "scipy", "pandas"
)  # fmt: skip


class Artefact:
    """One content-addressed folder of files; complete once `artefact.json` is written.

    Use: `with a.lock(): if not a.complete: ...write into a.folder...; a.finish()`.
    """

    def __init__(
        self, artefacts: Path, stage: str, inputs: Mapping[str, Any], version: int
    ) -> None:
        self.stage, self.version, self.inputs = stage, version, json.loads(to_json(inputs))
        made_from = to_json({"stage": stage, "version": version, "inputs": self.inputs})
        self.key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        self.folder = artefacts / f"{stage}-{self.key}"
        self._started = time.monotonic()
        self._checked = False
        _make(self.folder)

    @property
    def complete(self) -> bool:
        """True if finished and unharmed; False if never finished; `ArtefactError` if harmed."""
        if not self._checked:
            path = self.folder / "artefact.json"
            if not path.exists():
                return False
            info = self._read()
            if info.get("key") != self.key or not isinstance(info.get("files"), dict):
                raise self._harmed("artefact.json", "belongs to something else")
            for name, recorded in info["files"].items():
                self._check(name, recorded)
            self._checked = True
        return True

    @property
    def info(self) -> dict[str, Any]:
        """What `finish` wrote. Raises `ArtefactError` on an unfinished artefact."""
        if not self.complete:
            raise ArtefactError(f"{self.folder.name} is not finished: run the step that makes it")
        return self._read()

    def finish(self, extra: Mapping[str, Any] | None = None, shared_by: int = 1) -> None:
        """Declare the folder's files final: sizes, hashes and provenance, written last.

        The entries of `extra` stand beside the others in `info`. `seconds` counts from the
        opening of the lock, divided among `shared_by` artefacts that one pass makes; a stage that
        resumes may give its own total in `extra`.
        """
        for left_over in self.folder.rglob(".*.tmp*"):
            left_over.unlink()
        files = {
            path.relative_to(self.folder).as_posix(): _fingerprint(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != "artefact.json"
        }
        info = {
            "stage": self.stage,
            "key": self.key,
            "version": self.version,
            "inputs": self.inputs,
            "files": files,
            "seconds": round((time.monotonic() - self._started) / shared_by, 3),
            "date": _now(),
            "commit": commit(),
            "hardware": hardware(),
            "libraries": libraries(),
        }
        _write_json(self.folder / "artefact.json", info | dict(extra or {}))
        self._checked = True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the artefact alone, waiting for whoever is making it; freed when a process dies.

        Not re-entrant: a second lock of the same artefact in one process waits for ever.
        """
        with self.folder.with_name(f"{self.folder.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._started, self._checked = time.monotonic(), False
            _make(self.folder)
            yield

    def _read(self) -> dict[str, Any]:
        try:
            info = json.loads((self.folder / "artefact.json").read_text())
        except (OSError, ValueError):
            raise self._harmed("artefact.json", "cannot be read") from None
        if not isinstance(info, dict):
            raise self._harmed("artefact.json", "belongs to something else")
        return info

    def _check(self, name: str, recorded: Mapping[str, Any]) -> None:
        path = self.folder / name
        if not path.is_file():
            raise self._harmed(name, "is missing")
        size = path.stat().st_size
        if size != recorded["size"]:
            raise self._harmed(name, f"has {size:,} bytes instead of {recorded['size']:,}")
        if "sha256" in recorded and _sha256(path) != recorded["sha256"]:
            raise self._harmed(name, "was changed after it was made")

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

    Open it with `Run.open`; the bare constructor names the paths without making anything.
    """

    def __init__(self, profile: Profile, runs_dir: str | os.PathLike[str] = "runs") -> None:
        self.profile = profile
        self.runs_dir = Path(runs_dir).absolute()
        self.name = "-".join(filter(None, [profile.name, profile.overrides_hash]))
        self.folder = self.runs_dir / self.name

    @classmethod
    def open(cls, profile: Profile, runs_dir: str | os.PathLike[str] = "runs") -> Run:
        """Open the run of a profile, making its folder on first use.

        When the profile's file was edited since, the resolved copy is renewed, and tables of the
        older one count as missing.
        """
        run = cls(profile, runs_dir)
        for folder in ("tables", "values", "notebooks", "logs", "artefacts"):
            _make(run.folder / folder)
        resolved = yaml.safe_dump(profile.model_dump(), sort_keys=False, allow_unicode=True)
        path = run.folder / "profile.yml"
        if not path.exists() or path.read_text(encoding="utf-8") != resolved:
            for marker in (run.folder / "artefacts").iterdir():
                marker.unlink(missing_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(resolved, encoding="utf-8")
        return run

    def artefact(self, stage: str, inputs: Mapping[str, Any], version: int = 1) -> Artefact:
        """The artefact of a stage, keyed by its inputs (JSON) and by the stage's version."""
        artefact = Artefact(self.runs_dir / "artefacts", stage, inputs, version)
        # Empty files remember what the run stands on, for its provenance.
        marker = self.folder / "artefacts" / artefact.folder.name
        if not marker.exists():
            with atomic_write(marker) as temporary:
                temporary.touch()
        return artefact

    def save_table(self, name: str, frame: pd.DataFrame, about: str) -> Path:
        """Write `tables/<name>.csv` (without the index) and its provenance beside it."""
        path = self.folder / "tables" / f"{_plain(name)}.csv"
        with atomic_write(path) as temporary:
            frame.to_csv(temporary, index=False)
        about_table = {
            "table": name,
            "about": about,
            "rows": len(frame),
            "columns": [str(column) for column in frame.columns],
            "sha256": _sha256(path),
        }
        _write_json(path.with_suffix(".json"), about_table | self.provenance())
        return path

    def load_table(self, name: str) -> pd.DataFrame:
        """Read a table. `ArtefactError` if it is missing, harmed, or of an older profile."""
        path = self.folder / "tables" / f"{_plain(name)}.csv"
        if not self.has_table(name):
            raise ArtefactError(
                f"run {self.name} has no table '{name}' for this profile: {_who_saves(name)}"
            )
        if _sha256(path) != self._read(path.with_suffix(".json"))["sha256"]:
            raise ArtefactError(f"{path} was changed after it was made: {_who_saves(name)}")
        return pd.read_csv(path)

    def has_table(self, name: str) -> bool:
        """True if the table exists and was made with the profile as it is now."""
        path = self.folder / "tables" / f"{_plain(name)}.csv"
        return path.exists() and self._is_current(path.with_suffix(".json"))

    def save_json(self, name: str, value: object) -> Path:
        """Write a small value to `values/<name>.json`, with its provenance. NaN becomes null."""
        path = self.folder / "values" / f"{_plain(name)}.json"
        _write_json(path, {"value": value} | self.provenance())
        return path

    def load_json(self, name: str) -> Any:
        """Read back what `save_json` wrote; `ArtefactError` as for tables."""
        path = self.folder / "values" / f"{_plain(name)}.json"
        if not self._is_current(path):
            raise ArtefactError(
                f"run {self.name} has no value '{name}' for this profile: {_who_saves(name)}"
            )
        return self._read(path)["value"]

    def provenance(self) -> dict[str, Any]:
        """Where a result comes from. `run_seconds`: time spent making the run's artefacts."""
        used = [self._read(path) for path in self._artefacts()]
        tokens = [info["hashes"] for info in used if info["stage"] == "tokens" and "hashes" in info]
        return {
            "profile": self.profile.name,
            "profile_hash": self.profile.hash,
            "run": self.name,
            "overrides": self.profile.overrides,
            "seeds": {
                "text": self.profile.text.seed,
                "training": self.profile.training.seeds,
            },
            "token_hashes": tokens[-1] if tokens else None,
            "commit": commit(),
            "hardware": hardware(),
            "libraries": libraries(),
            "date": _now(),
            "run_seconds": round(sum(info["seconds"] for info in used), 1),
        }

    def write_manifest(self) -> Path:
        """Write `manifest.json`: hashes of tables and values, the same for the same results."""
        tables = {
            path.stem: _sha256(path)
            for path in sorted((self.folder / "tables").glob("*.csv"))
            if self.has_table(path.stem)
        }
        values = {
            path.stem: hashlib.sha256(to_json(self.load_json(path.stem)).encode()).hexdigest()
            for path in sorted((self.folder / "values").glob("*.json"))
            if self._is_current(path)
        }
        path = self.folder / "manifest.json"
        _write_json(path, {"profile_hash": self.profile.hash, "tables": tables, "values": values})
        return path

    def stages(self) -> list[tuple[str, float]]:
        """(stage, seconds spent making it) of every finished artefact of the run."""
        made = [self._read(path) for path in self._artefacts()]
        return [(info["stage"], info["seconds"]) for info in made]

    def _artefacts(self) -> list[Path]:
        """`artefact.json` of every finished artefact that the run has asked for."""
        names = sorted(marker.name for marker in (self.folder / "artefacts").glob("[!.]*"))
        paths = [self.runs_dir / "artefacts" / name / "artefact.json" for name in names]
        return [path for path in paths if path.exists()]

    def _is_current(self, path: Path) -> bool:
        return path.exists() and self._read(path).get("profile_hash") == self.profile.hash

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise ArtefactError(f"{path} cannot be read: delete it and run again")
        return content


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path with the same suffix.

    The temporary file is flushed to disk and moved into place at the end. A full disk becomes an
    `ArtefactError`; after any error the old file, if there was one, is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # Writers in C++ and Rust report a full disk under types of their own, some without saying.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or os.strerror(errno.ENOSPC) in str(error)
        if full or shutil.disk_usage(path.parent).free < 2**20:
            raise ArtefactError(
                f"the disk is full: {path.name} could not be written to {path.parent}; "
                f"free some space and run again, what is finished is kept"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Folder of downloads and conversions: $METASAE_CACHE, or ~/.cache/metasae."""
    folder = Path(os.environ.get("METASAE_CACHE") or "~/.cache/metasae").expanduser()
    _make(folder)
    return folder


def to_json(value: object) -> str:
    """Strict, canonical JSON. NaN and infinities become null; numpy numbers become plain ones."""
    return json.dumps(_plain_values(value), sort_keys=True, allow_nan=False, ensure_ascii=False)


@cache
def commit() -> str:
    """Commit of the sources, "+changes" on a dirty tree, "unknown" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, and the GPUs by name."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        processor = named.group(1) if named else processor
    usable = getattr(os, "sched_getaffinity", None)
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        gpus = listed.stdout.strip().splitlines() if listed.returncode == 0 else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": len(usable(0)) if usable else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


@cache
def libraries() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _plain_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain_values(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _write_json(path: Path, value: object) -> None:
    readable = json.dumps(json.loads(to_json(value)), indent=1, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(readable + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"size": size} | ({"sha256": _sha256(path)} if size <= HASH_LIMIT else {})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"the folder {folder} cannot be made: {error.strerror}") from None


def _plain(name: str) -> str:
    """A name that becomes a file: no separators, nothing that leaves the folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ArtefactError(f"'{name}' cannot name a file: use letters, digits, '.', '_' and '-'")
    return name


def _who_saves(name: str) -> str:
    """Which notebook makes a table or value, found by its own call."""
    call = re.compile(rf"""save_(table|json)\(\s*["']{re.escape(name)}["']""")
    for folder in repository_folders("notebooks"):
        for path in sorted(folder.glob("*.py")):
            if call.search(path.read_text(encoding="utf-8")):
                return f"run the notebook {path.stem} first"
    return "run the notebook that saves it first"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
