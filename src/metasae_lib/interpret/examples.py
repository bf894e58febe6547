"""Examples: a window of tokens with a feature's activations, and its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Array = NDArray[Any]
WINDOW = 32
QUANTILES = 5
NO_TOKEN = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Example:
    """One segment as one feature sees it.

    pieces: the text of each token, exact: joined they are the segment's text, and a character of
    several bytes stands whole at the token where it begins. acts: activation on each token, 0 where
    the feature does not fire. ids: the token ids. segment: its number in the role.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    acts: tuple[float, ...]
    segment: int

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
    """Token ids to their exact text, for byte-level BPE and for SentencePiece with byte fallback.

    `special`: the ids of special tokens, which are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
        self._characters = _byte_characters() if "ByteLevel" in decoder else None
        self._bytes: dict[int, bytes] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token. A special token is empty; half a character at an edge is U+FFFD.

        A character whose bytes are spread over tokens belongs to the first of them.
        """
        parts = [self._of(i) for i in ids]
        joined = b"".join(parts)
        if joined.isascii():  # nearly always, and ten times as fast
            return tuple(part.decode("ascii") for part in parts)
        pieces = [""] * len(parts)
        position = 0
        for k, end in enumerate(accumulate(map(len, parts))):
            while position < end:
                length = _character_length(joined, position)
                piece = joined[position : position + length]
                pieces[k] += piece.decode("utf-8", "replace")
                position += length
        return tuple(pieces)

    def _of(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._convert(token)
        return self._bytes[token]

    def _convert(self, token: int) -> bytes:
        if token in self.special:
            return b""
        form = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._characters is not None:
            if all(character in self._characters for character in form):
                return bytes(self._characters[character] for character in form)
            return form.encode()  # an added token is written as it is
        if len(form) == 6 and form.startswith("<0x") and form.endswith(">"):
            return bytes([int(form[3:5], 16)])
        return form.replace("▁", " ").encode()


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes (GPT-2's table, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + k): byte for k, byte in enumerate(others)}


def _character_length(text: bytes, start: int) -> int:
    """Bytes of the UTF-8 character at `start`; 1 where the bytes are not a whole one."""
    first = text[start]
    length = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        text[start : start + length].decode("utf-8")
    except UnicodeDecodeError:
        return 1
    return length


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
        rows = np.arange(self.n_rows)
        first = rows // self.chunk_rows * 8 * self.chunk_bytes
        first += rows % self.chunk_rows * self.per_row
        segments: Array = (first[:, None] + np.arange(self.per_row)).ravel()
        return segments
