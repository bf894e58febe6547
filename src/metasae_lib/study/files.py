"""Files written whole or not at all, canonical JSON, hashes, and where files are looked for."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metasae_lib.study.errors import ArtefactError

_REMEMBER_FROM = 2**24  # bytes; smaller files are read faster than looked up
_CLOCK_TICK = 10**9  # nanoseconds within which two changes may have one time
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
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
        if getattr(error, "errno", None) in _REFUSED:
            raise may_not_write(path) from error
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
        with suppress(OSError):
            temporary.unlink()


def repository_folders(name: str) -> list[Path]:
    """Folders called `name` from the working directory upwards, then beside the sources."""
    here = Path.cwd()
    roots = [here, *here.parents, Path(__file__).resolve().parents[3]]
    return [folder for root in dict.fromkeys(roots) if (folder := root / name).is_dir()]


def local_path(given: str) -> Path:
    """A path that a profile or a variable gives; a relative one counts from the repository.

    So it means one place on the command line and in a notebook, whose working folders differ.
    """
    root = next((folder.parent for folder in repository_folders("profiles")), Path.cwd())
    return root / os.path.expanduser(given)


def matching_files(given: str) -> list[Path]:
    """What is at a `local_path` or fits a pattern, sorted; `**` is any number of folders.

    As much of it as is there is a name, whatever brackets it holds, and the rest the pattern.
    """
    whole = local_path(given)
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if there == whole:
        return [whole]
    found = glob.glob(str(whole.relative_to(there)), root_dir=there, recursive=True)
    return sorted(there / name for name in found)


def encodable(text: str) -> str:
    """The text with surrogate pairs as characters and U+FFFD for half a pair.

    JSON and YAML can spell halves, and names of files hold them; nothing can be written with them.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def cache_folder() -> Path:
    """Folder of downloads and conversions: $METASAE_CACHE, or ~/.cache/metasae."""
    given = os.environ.get("METASAE_CACHE")
    folder = local_path(given or "~/.cache/metasae")
    if not given and os.path.expanduser("~") == "~":
        raise ArtefactError("this account has no home: set METASAE_CACHE to a folder of yours")
    try:
        make_folder(folder)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; METASAE_CACHE names it") from None
    return folder


def to_json(value: object) -> str:
    """Strict, canonical JSON. NaN and infinities become null; numpy numbers become plain ones."""

    def plain(other: Any) -> Any:
        if hasattr(other, "tolist"):  # numpy scalars and arrays
            return other.tolist()
        raise TypeError(f"{type(other).__name__} has no place in JSON")

    strict = json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
    return encodable(json.dumps(strict, sort_keys=True, ensure_ascii=False))


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
    if memory.exists():
        return memory.read_text(encoding="ascii")
    found = sha256_of(path)
    with suppress(ArtefactError):  # a cache that another user shares may be read-only
        make_folder(folder)
        with atomic_write(memory) as temporary:
            temporary.write_text(found, encoding="ascii")
    return found


def may_not_write(path: Path) -> ArtefactError:
    """The error of a file that the system refuses to write."""
    return ArtefactError(
        f"{path.name} may not be written to {path.parent}, which is read-only or another user's: "
        f"choose a folder of yours (runs_dir, or METASAE_CACHE for the cache)"
    )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(
            f"the folder {folder} cannot be made ({error.strerror}): choose a folder of yours"
        ) from None
