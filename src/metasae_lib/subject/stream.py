"""A Hugging Face dataset as a stream of documents that faults of the network do not end."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metasae_lib.study import CorpusError
from metasae_lib.study.errors import first_line
from metasae_lib.study.files import local_path
from metasae_lib.subject.embedded import Document
from metasae_lib.subject.origin import folder_hashes, hub_commit

_TRIES = 8  # in a row without a new document, of a stream that has given some
_PAUSE = 1.0  # seconds before the second try; each further pause is twice as long, a minute at most


class Stream:
    """The documents of an `hf:` text in their own order.

    `place`: where reading stands after the last document, as JSON; given back, reading goes on
    there. A cut, a stall or a server's fault is waited for and reading goes on at the next
    document; what cannot be had at all, and what no patience cures, is a `CorpusError`.
    """

    def __init__(self, source: str, column: str, place: dict[str, Any] | None = None) -> None:
        self._name, self._commit, self._config = dataset_at(source)
        self._column, self.place = column, place

    def __iter__(self) -> Iterator[Document]:
        tries, begun = 0, self.place is not None
        while True:
            try:
                for document in self._read():
                    tries, begun = 0, True
                    yield document
                return
            except CorpusError:
                raise
            except Exception as error:  # the hub, the network and the readers of many formats
                tries += 1
                if not begun or tries == _TRIES or not _passing(error):
                    raise self._failed(error) from error
                time.sleep(min(_PAUSE * 2 ** (tries - 1), 60))

    def _read(self) -> Iterator[Document]:
        import datasets

        stream = datasets.load_dataset(
            self._name, self._config, split="train", streaming=True, revision=self._commit
        )
        if self.place is not None:
            stream.load_state_dict(self.place)
        for example in stream:
            if self._column not in example:
                raise no_column(f"the dataset {self._name}", self._column, example)
            self.place = stream.state_dict()
            text = example[self._column]
            yield Document(self._name, "" if text is None else text)

    def _failed(self, error: Exception) -> CorpusError:
        return CorpusError(
            f"the dataset {self._name} could not be read ({first_line(error)}): check text.source "
            f"and the network and run again, which goes on where reading stopped; or choose "
            f"text.source embedded or files:"
        )


def dataset_identity(source: str) -> str | dict[str, str]:
    """What an `hf:` text is, for keys: its commit, or the hashes of a folder's files."""
    name, commit, _ = dataset_at(source)
    return commit or folder_hashes(Path(name))


def dataset_at(source: str) -> tuple[str, str | None, str | None]:
    """Name and commit, of a folder the whole path and None, and configuration of an `hf:` text."""
    name, _, config = source.removeprefix("hf:").partition(":")
    folder = str(local_path(name))
    if not os.path.isdir(folder):
        return name.partition("@")[0], hub_commit("dataset", name), config or None
    if glob.escape(folder) != folder:
        raise CorpusError(
            f"text.source is the folder {folder}, and datasets takes the *, ? or [ in its name for "
            f"a pattern: rename it, or name its files by files:"
        )
    return folder, None, config or None


def no_column(where: str, column: str, names: Iterable[str]) -> CorpusError:
    """The error of a text without the profile's column."""
    return CorpusError(
        f"text.column is '{column}', but {where} has only {', '.join(names) or 'nothing'}: "
        f"set text.column"
    )


def _passing(error: BaseException | None) -> bool:
    """Whether waiting can cure an error: one of the network, or a server that is not well."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        # By name: the hub's library changes the one that it asks by (httpx, httpx2).
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"TransportError", "ConnectionError", "TimeoutError", "EOFError"}:
            return True
        error = error.__cause__ or error.__context__
    return False
