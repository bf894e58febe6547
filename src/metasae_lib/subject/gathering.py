"""Token ids of the roles, gathered on disk while text is read: memory stays small, and a killed
reading goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from metasae_lib.study import ArtefactError, Role
from metasae_lib.study.files import atomic_write, write_json
from metasae_lib.study.sections import ROLES

_STATE = "gathered.json"
_BLOCK_ROWS = 8192


class Gathering:
    """Ids of each role in the order of their documents, in files of a folder.

    `held`: ids by role. `state`: what `save` was given last, None at the beginning. `seen`: hashes
    of the documents that were taken or passed over. What was added after the last `save` is gone
    when the process is killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.held = Counter[Role]()
        self.state: Any = None
        self.seen: set[bytes] = set()
        self._names: list[str] = []
        sizes: dict[str, int] = {}
        if (folder / _STATE).exists():
            kept = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            self.state, self._names, sizes = kept["state"], kept["names"], kept["sizes"]
            self.held.update(kept["held"])
        self._files: dict[str, IO[bytes]] = {}
        self._open = ExitStack()
        for name in (
            "seen",
            *(f"{role}.{what}" for role in ROLES for what in ("ids", "documents")),
        ):
            path = folder / f"{name}.part"
            path.touch()
            os.truncate(path, sizes.get(name, 0))
            self._files[name] = self._open.enter_context(path.open("ab"))
        digests = (folder / "seen.part").read_bytes()
        self.seen.update(digests[k : k + 32] for k in range(0, len(digests), 32))

    def __enter__(self) -> Gathering:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self._open.close()
        except OSError as failed:
            if error is None:
                raise self._full(failed) from failed

    def is_new(self, digest: bytes) -> bool:
        """Whether a document is met for the first time; from now on it has been."""
        if digest in self.seen:
            return False
        self.seen.add(digest)
        self._write("seen", digest)
        return True

    def add(self, role: Role, source: str, ids: list[int]) -> None:
        """One document's ids."""
        if source not in self._names:
            self._names.append(source)
        self._write(f"{role}.ids", np.array(ids, "<i4").tobytes())
        about = np.array([self._names.index(source), len(ids)], "<i4")
        self._write(f"{role}.documents", about.tobytes())
        self.held[role] += len(ids)

    def save(self, state: Any) -> None:
        """Make what was added last, together with where reading stands (JSON)."""
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._full(error) from error
        sizes = {name: file.tell() for name, file in self._files.items()}
        kept = {"state": state, "names": self._names, "sizes": sizes, "held": dict(self.held)}
        write_json(self._folder / _STATE, kept)
        self.state = state

    def write_rows(self, role: Role, n_rows: int, per_row: int, bos: int | None) -> str:
        """Write `<role>.npy`, (n_rows, per_row) ids or one more with BOS before each row, and
        `<role>-documents.npy`, (documents, 2): the place of each one's first id among all ids, BOS
        not counted, and its source; returns 16 hex digits of SHA-256 over the ids. `names` says
        which source a number is."""
        ids = np.memmap(self._folder / f"{role}.ids.part", "<i4", "r", shape=(n_rows * per_row,))
        digest = hashlib.sha256()
        with atomic_write(self._folder / f"{role}.npy") as temporary:
            shape = n_rows, per_row + (bos is not None)
            header = {"descr": "<i4", "fortran_order": False, "shape": shape}
            with temporary.open("wb") as file:  # not a map: a full disk would kill the process
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, n_rows * per_row, _BLOCK_ROWS * per_row):
                    part = ids[start : start + _BLOCK_ROWS * per_row].reshape(-1, per_row)
                    content = (
                        np.insert(part, 0, bos, axis=1) if bos is not None else part
                    ).tobytes()
                    file.write(content)
                    digest.update(content)
        about = np.fromfile(self._folder / f"{role}.documents.part", "<i4").reshape(-1, 2)
        source = np.array(self._order())[about[:, 0]]
        first = np.cumsum(about[:, 1], dtype=np.int64) - about[:, 1]
        with atomic_write(self._folder / f"{role}-documents.npy") as temporary:
            np.save(temporary, np.stack([first, source], 1)[first < n_rows * per_row])
        return digest.hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """The sources, in the order of their numbers in `<role>-documents.npy`."""
        return sorted(self._names)

    def clear(self) -> None:
        """Remove what was needed only while reading."""
        for path in (*self._folder.glob("*.part"), self._folder / _STATE):
            path.unlink(missing_ok=True)

    def _order(self) -> list[int]:
        return [self.names.index(name) for name in self._names]

    def _write(self, name: str, content: bytes) -> None:
        try:
            self._files[name].write(content)
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> ArtefactError:
        return ArtefactError(
            f"{self._folder.name} could not be written ({error.strerror}): free some space and run "
            f"again, which goes on where reading stopped"
        )
