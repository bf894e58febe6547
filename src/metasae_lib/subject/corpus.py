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

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from metasae_lib.study import Artefact, CorpusError, Profile, Role, Run, atomic_write, progress
from metasae_lib.study.errors import first_line
from metasae_lib.study.files import (
    content_hash,
    encodable,
    local_path,
    matching_files,
    to_json,
)
from metasae_lib.study.known import EMBEDDED_TOKENS, WHEELS
from metasae_lib.study.profile import within_shares
from metasae_lib.study.sections import ROLE_SHARES, ROLES
from metasae_lib.subject import embedded
from metasae_lib.subject.embedded import Document
from metasae_lib.subject.origin import folder_hashes, hub_commit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_VERSION = 1
# Longer texts are shuffled in pieces (of one role all the same), so that a role is not filled by a
# few speeches of 20,000 tokens.
_PIECE = 8000
_BATCH = 512  # documents tokenised at once


class Tokens:
    """The token rows of a run, by role."""

    def __init__(self, artefact: Artefact, profile: Profile) -> None:
        self.tokenizer = load_tokenizer(profile)
        self._folder = artefact.folder
        self._kept_per_row = profile.text.kept_per_row
        self._info = artefact.info

    def rows(self, role: Role) -> np.ndarray:
        """Token ids (rows, context_length), int32, mapped from disk."""
        return np.load(self._folder / f"{role}.npy", mmap_mode="r")

    def sources(self, role: Role) -> np.ndarray:
        """Package, dataset or "files" that each row's first text token comes from, (rows,)."""
        codes = np.load(self._folder / f"{role}-sources.npy")
        return np.asarray(self._info["sources"])[codes]

    def hash(self, role: Role) -> str:
        """16 hex digits of SHA-256 over the role's ids as little-endian int32."""
        return str(self._info["hashes"][role])

    def n_tokens(self, role: Role) -> int:
        """Tokens that count: all, or all but position 0 of each row under `text.skip_first`."""
        return len(self.rows(role)) * self._kept_per_row


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
        inputs["wheels"] = [WHEELS[package].sha256 for package in EMBEDDED_TOKENS]
    elif profile.text.source.startswith("files:"):
        inputs["files"] = [content_hash(path) for path in _files(profile.text.source)]
    else:
        name, commit, _ = _dataset_at(profile.text.source)
        inputs["dataset"] = commit or folder_hashes(Path(name))
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
    filled = _fill(profile, {role: rows[role] * per_row for role in ROLES})
    names = sorted({name for stream in filled.values() for name, _ in stream})
    hashes = {}
    for role, stream in filled.items():
        wanted = rows[role] * per_row
        ids = np.concatenate([np.empty(0, "<i4"), *(part for _, part in stream)])
        if len(ids) < wanted:
            held = len(ids) // per_row * text.kept_per_row
            raise CorpusError(
                f"role {role} needs {text.roles[role]:,} tokens but the text holds {held:,} for "
                f"it ({ROLE_SHARES[role]:.0%} of the documents): lower text.roles.{role} or add "
                f"text"
            )
        ends = np.cumsum([len(part) for _, part in stream])
        document = np.searchsorted(ends, np.arange(0, wanted, per_row), "right")
        sources = np.array([names.index(name) for name, _ in stream], np.uint8)[document]
        ids = ids[:wanted].reshape(rows[role], per_row)
        if text.bos == "every_row":
            ids = np.insert(ids, 0, bos, axis=1)
        for name, content in ((f"{role}.npy", ids), (f"{role}-sources.npy", sources)):
            with atomic_write(artefact.folder / name) as temporary:
                np.save(temporary, content)
        hashes[role] = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    artefact.finish({"hashes": hashes, "sources": names})


# Of each document of a role, in their order: its source and its token ids.
_Streams = dict[Role, list[tuple[str, np.ndarray]]]


def _fill(profile: Profile, needed: Mapping[Role, int]) -> _Streams:
    """Read and tokenise documents until every role has its tokens, or the text ends."""
    tokenizer, held = load_tokenizer(profile), Counter[Role]()
    streams: _Streams = {role: [] for role in ROLES}
    opened = profile.text.bos == "document_start"
    start, end = ([tokenizer.bos_token_id], "") if opened else ([], "\n\n")

    def wanting(role: Role) -> bool:
        return held[role] < needed[role]

    texts = ((role, document) for role, document in _with_roles(profile) if wanting(role))
    with progress(sum(needed.values()), "tokens") as bar:
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
                    made = np.array(start + document_ids, "<i4")
                    streams[role].append((document.source, made))
                    held[role] += len(made)
                    bar.update(len(document_ids))
    return streams


def _with_roles(profile: Profile) -> Iterator[tuple[Role, Document]]:
    """Each distinct document once, with its role, in the order in which roles are filled.

    A stream keeps its own order. A text that is at hand is put in the order of seeded hashes, which
    depends neither on the order of its files nor on the machine.
    """
    text = profile.text
    if text.source.startswith("hf:"):
        for digest, document in _distinct(_dataset(text.source, text.column)):
            yield _role(digest), document
        return
    if text.source == "embedded":
        found: Iterable[Document] = embedded.documents()
    else:
        found = (doc for path in _files(text.source) for doc in _read(path, text.column))
    order = sorted(
        (
            hashlib.sha256(f"{text.seed}:{number}:".encode() + digest).digest(),
            _role(digest),
            Document(document.source, piece),
        )
        for digest, document in _distinct(found)
        for number, piece in enumerate(_pieces(document.text))
    )
    kept = _kept_fractions((piece for _, _, piece in order), text.max_share)
    for key, role, piece in order:
        if _uniform(key[8:]) < kept[piece.source]:
            yield role, piece


def _distinct(documents: Iterable[Document]) -> Iterator[tuple[bytes, Document]]:
    """Non-empty documents without repetitions, stripped, with the SHA-256 of their text.

    The same text twice would otherwise count twice in a role; by its hash it is never in two roles.
    """
    seen: set[bytes] = set()
    for document in documents:
        if not isinstance(document.text, str):
            raise CorpusError(
                f"text.column holds {type(document.text).__name__} values in {document.source}: "
                f"set it to a column of text"
            )
        text = encodable(document.text).strip()
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield digest, Document(document.source, text)


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


def _dataset(source: str, column: str) -> Iterator[Document]:
    """A Hugging Face dataset, streamed in its own order."""
    import datasets

    name, commit, config = _dataset_at(source)
    try:
        stream = datasets.load_dataset(name, config, split="train", streaming=True, revision=commit)
        for number, example in enumerate(stream):
            if number == 0 and column not in example:
                raise _no_column(f"the dataset {name}", column, example)
            yield Document(name, "" if example[column] is None else example[column])
    except CorpusError:
        raise
    except Exception as error:  # the hub, the network and the readers of many formats
        raise CorpusError(
            f"the dataset {name} could not be read ({first_line(error)}): check text.source and "
            f"the network, or choose text.source embedded or files:"
        ) from error


def _dataset_at(source: str) -> tuple[str, str | None, str | None]:
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


def _files(source: str) -> list[Path]:
    found = matching_files(source.removeprefix("files:"))
    if not found:
        raise CorpusError(f"text.source is '{source}', and no file is there")
    return found


def _read(path: Path, column: str) -> Iterator[Document]:
    """Documents of one file: a row of parquet, a line of jsonl, or pieces of a txt file.

    A txt file says nothing of documents: it is cut at ends of paragraphs after at most 8,000
    characters, and each part counts as a document.
    """
    try:
        if path.suffix == ".parquet":
            texts = _parquet(path, column)
        elif path.suffix == ".jsonl":
            texts = _jsonl(path, column)
        elif path.suffix == ".txt":
            texts = _pieces(path.read_text(encoding="utf-8-sig"))  # Windows begins with a mark
        else:
            raise CorpusError(f"{path} is none of .parquet, .jsonl and .txt: change text.source")
        yield from (Document("files", "" if text is None else text) for text in texts)
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's, JSON's and Unicode's too
        raise CorpusError(
            f"{path} could not be read ({first_line(error)}): repair it or leave it out of "
            f"text.source"
        ) from error


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                entry = json.loads(line)
                entry = entry if isinstance(entry, dict) else {}
                if column not in entry:
                    raise _no_column(f"{path} line {number}", column, entry)
                yield entry[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise _no_column(str(path), column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def _no_column(where: str, column: str, names: Iterable[str]) -> CorpusError:
    return CorpusError(
        f"text.column is '{column}', but {where} has only {', '.join(names) or 'nothing'}: "
        f"set text.column"
    )
