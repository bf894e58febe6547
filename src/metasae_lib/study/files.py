"""Files written whole or not at all, canonical JSON, hashes, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metasae_lib.study.errors import ArtefactError

_REMEMBER_FROM = 2**24  # bytes; smaller files are read faster than looked up
_CLOCK_TICK = 10**9  # nanoseconds within which two changes may have one time
_HASH_LIMIT = 64 * 2**20  # larger files are checked by size alone


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
    make_folder(folder)
    return folder


def to_json(value: object) -> str:
    """Strict, canonical JSON. NaN and infinities become null; numpy numbers become plain ones."""

    def plain(other: Any) -> Any:
        if hasattr(other, "tolist"):  # numpy scalars and arrays
            return other.tolist()
        raise TypeError(f"{type(other).__name__} has no place in JSON")

    strict = json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
    return json.dumps(strict, sort_keys=True, ensure_ascii=False)


def write_json(path: Path, value: object) -> None:
    readable = json.dumps(json.loads(to_json(value)), indent=1, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(readable + "\n", encoding="utf-8")


def file_record(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"size": size} | ({"sha256": sha256_of(path)} if size <= _HASH_LIMIT else {})


def sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtefactError(f"{path} could not be read: {error.strerror}") from None


def content_hash(path: Path) -> str:
    """`sha256_of`, whole also for large files, which are read again only after a change.

    What was read is remembered in the cache folder, under what the system keeps of each file and
    no writer can set back.
    """
    state = path.stat()
    recent = time.time_ns() - state.st_ctime_ns < _CLOCK_TICK
    if state.st_size < _REMEMBER_FROM or recent:
        return sha256_of(path)
    known = f"{path.resolve()} {state.st_dev} {state.st_ino} {state.st_size} {state.st_ctime_ns}"
    folder = cache_folder() / "hashes"
    memory = folder / hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()
    if not memory.exists():
        make_folder(folder)
        with atomic_write(memory) as temporary:
            temporary.write_text(sha256_of(path), encoding="ascii")
    return memory.read_text(encoding="ascii")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"the folder {folder} cannot be made: {error.strerror}") from None
