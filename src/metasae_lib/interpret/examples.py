"""Examples: a window of tokens with a feature's activations, and its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metasae_lib.study.known import attribution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Array = NDArray[Any]
WINDOW = 32
QUANTILES = 5


@dataclass(frozen=True)
class Example:
    """One segment as one feature sees it.

    pieces: the text of each token, exact: joined they are the segment's text, and a character of
    several bytes stands whole at the token where it begins. acts: activation on each token, 0 where
    the feature does not fire. ids: the token ids. segment: its number in the role. sources: of the
    documents that it is cut from.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    acts: tuple[float, ...]
    segment: int
    sources: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """What must stand beside it: titles and licences of its sources."""
        return attribution(self.sources)

    @property
    def text(self) -> str:
        """The segment's text."""
        return "".join(self.pieces)

    @property
    def strength(self) -> float:
        """The largest activation; 0 where the feature does not fire."""
        return max(self.acts)

    @property
    def peak(self) -> int:
        """Index of the token with the largest activation, the first of equals."""
        return self.acts.index(self.strength)


class Pieces:
    """Token ids to their exact text, for byte-level BPE and for SentencePiece with byte fallback;
    for tokenizers of whole words and word pieces with a space before each word.

    `special`: the ids of special tokens, which are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        form = json.loads(backend.to_str()) if backend is not None else {}
        decoder = json.dumps(form.get("decoder"))
        # What marks the pieces that no space comes before, or the last piece of a word.
        words = form.get("model", {}).get("type") in ("WordPiece", "WordLevel")
        self._inside = "##" if words else ""
        self._end = "</w>" if "BPEDecoder" in decoder else ""
        self._byte_of: dict[str, int] = {}  # the characters by which byte-level BPE writes bytes
        if "ByteLevel" in decoder:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._bytes, self._plain = cache(self._convert), cache(self._as_ascii)

    def __call__(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token. A special token is empty; half a character at an edge is U+FFFD.

        A character whose bytes are spread over tokens belongs to the first of them.
        """
        plain = tuple(map(self._plain, ids))
        if None not in plain:  # nearly always, and ten times as fast
            return plain  # type: ignore[return-value]
        parts = [self._bytes(i) for i in ids]
        joined = b"".join(parts)
        pieces = [""] * len(parts)
        owner = [k for k, part in enumerate(parts) for _ in part]
        position = 0
        for character in joined.decode("utf-8", "surrogateescape"):  # a byte that is none: U+DCxx
            broken = "\udc80" <= character <= "\udcff"
            pieces[owner[position]] += "\ufffd" if broken else character
            position += 1 if broken else len(character.encode())
        return tuple(pieces)

    def _as_ascii(self, i: int) -> str | None:
        part = self._bytes(i)
        return part.decode("ascii") if part.isascii() else None

    def _convert(self, token: int) -> bytes:
        if token in self.special:
            return b""
        form = str(self._tokenizer.convert_ids_to_tokens(int(token)))
        if self._byte_of:
            if all(character in self._byte_of for character in form):
                return bytes(self._byte_of[character] for character in form)
            return form.encode()  # an added token is written as it is
        if len(form) == 6 and form.startswith("<0x") and form.endswith(">"):
            return bytes([int(form[3:5], 16)])
        if self._inside:
            start = "" if form.startswith(self._inside) else " "
            return (start + form.removeprefix(self._inside)).encode()
        if self._end:
            return form.replace(self._end, " ").encode()
        return form.replace("▁", " ").encode()


@dataclass(frozen=True)
class Layout:
    """Where segments lie: `chunk_rows` token rows a chunk, each cut into pieces of `window`.

    Segments are numbered chunk by chunk with room up to a whole byte of bits, so numbers can have
    gaps at the end of a chunk. Tokens after a row's last whole window belong to no segment.
    """

    n_rows: int
    context_length: int
    chunk_rows: int
    window: int

    @property
    def per_row(self) -> int:
        """Segments of one row."""
        return self.context_length // self.window

    @property
    def chunk_bytes(self) -> int:
        """Bytes that hold one feature's bits of a chunk."""
        return -(-self.chunk_rows * self.per_row // 8)

    @property
    def n_chunks(self) -> int:
        """Chunks of the role."""
        return -(-self.n_rows // self.chunk_rows)

    def place(self, segment: int) -> tuple[int, int]:
        """Row and first column of a segment."""
        chunk, local = divmod(segment, 8 * self.chunk_bytes)
        row, part = divmod(local, self.per_row)
        return chunk * self.chunk_rows + row, part * self.window

    def segments(self) -> Array:
        """The numbers of all segments, ascending."""
        chunk, row = np.divmod(np.arange(self.n_rows), self.chunk_rows)
        first = 8 * chunk * self.chunk_bytes + row * self.per_row
        segments: Array = (first[:, None] + np.arange(self.per_row)).ravel()
        return segments
