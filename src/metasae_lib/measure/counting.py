"""Exact co-occurrence counts within one dictionary or between two.

N tokens, N11 tokens on which both features fire, N1 those on which one does: integers, exact at
any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from metasae_lib.measure.patterns import Array, Pattern, above, add_pairs, index_type
from metasae_lib.study.errors import MeasureError

INT32_MAX = 2**31 - 1  # no count exceeds the number of tokens, so int32 holds all up to here
FLOAT32_EXACT = 2**24  # integers up to here are exact in float32
FLUSH_ENTRIES = 2**22  # pattern entries counted at once: their lists still fit the CPU's cache
DENSE_ADVANTAGE = 100  # multiply-adds of a float32 product in the time of one sparse increment
_BLOCK_ROWS = 2048  # rows of counts a dense product makes at a time


@dataclass(frozen=True)
class Counts:
    """Counts of a scan within one dictionary.

    n11: (n, n) integers, symmetric, n1 on the diagonal (in memory or on disk). n1: (n,) int64
    tokens on which each feature fires. n_tokens: tokens scanned.
    """

    n11: Array
    n1: Array
    n_tokens: int

    @property
    def alive(self) -> Array:
        """(n,) bool: features whose φ with others is defined."""
        return (self.n1 > 0) & (self.n1 < self.n_tokens)

    @property
    def rates(self) -> Array:
        """(n,) share of tokens on which each feature fires."""
        return self.n1 / self.n_tokens

    @property
    def l0(self) -> float:
        """Mean number of features that fire on a token."""
        return float(self.n1.sum() / self.n_tokens)


@dataclass(frozen=True)
class CrossCounts:
    """Counts between two dictionaries over the same tokens: n11 (n_a, n_b), n1_a, n1_b."""

    n11: Array
    n1_a: Array
    n1_b: Array
    n_tokens: int


class CooccurrenceCounter:
    """Counts co-occurring pairs chunk by chunk, within one dictionary or between two.

    n_a, n_b: numbers of features; n_b None counts within one dictionary. device: where the counts
    are kept. On a CPU pairs are counted one by one from sparse patterns, or by a float32 product
    where patterns are so dense that this is cheaper; on a GPU by products. The integers are the
    same.
    """

    def __init__(
        self, n_a: int, n_b: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if n_a < 1 or (n_b is not None and n_b < 1):
            raise MeasureError(f"cannot count {n_a} by {n_b} features: give positive numbers")
        self.n_a, self.n_b = n_a, n_b
        self.device = torch.device(device)
        self.n_tokens = 0
        self._n11 = torch.zeros(n_a, n_b or n_a, dtype=torch.int32, device=self.device)
        self._n1_a = torch.zeros(n_a, dtype=torch.int64)
        self._n1_b = torch.zeros(n_b, dtype=torch.int64) if n_b else self._n1_a
        self._waiting: list[tuple[Pattern, Pattern | None]] = []
        self._entries = 0

    def update(self, fired_a: Any, fired_b: Any = None) -> None:
        """Add tokens. fired_a: (t, n_a), fired_b: (t, n_b) or None as at construction.

        Bool (or 0/1 integer) torch tensors or NumPy arrays, or sparse CSR matrices of torch or
        SciPy in which every stored non-zero counts as firing, once if stored twice; or a
        `patterns.Pattern`.
        Raises MeasureError on shapes that do not fit.
        """
        if (fired_b is None) != (self.n_b is None):
            raise MeasureError(
                "give fired_b exactly if the counter was made for two dictionaries (n_b)"
            )
        if self.device.type == "cpu":
            self._add(
                _pattern(fired_a, self.n_a),
                None if self.n_b is None else _pattern(fired_b, self.n_b),
            )
            return
        a = _dense(fired_a, self.n_a).to(self.device)
        b = None if self.n_b is None else _dense(fired_b, self.n_b).to(self.device)
        self._grow(len(a), None if b is None else len(b))
        self._n1_a += a.sum(0).cpu()
        if b is not None:
            self._n1_b += b.sum(0).cpu()
        self._add_product(a, b)

    @property
    def n11(self) -> Tensor:
        """Exact counts, a new int64 tensor: (n_a, n_a) symmetric with n1 on the diagonal, or
        (n_a, n_b)."""
        return self._finished().to(torch.int64)

    @property
    def n1_a(self) -> Tensor:
        """(n_a,) int64: tokens on which each feature of the first dictionary fires."""
        return self._n1_a.clone()

    @property
    def n1_b(self) -> Tensor:
        """(n_b,) int64 for the second dictionary; that of the first if there is one only."""
        return self._n1_b.clone()

    def counts(self) -> Counts:
        """The counts within one dictionary, without a copy: valid until the next update."""
        if self.n_b is not None:
            raise MeasureError("this counter is between two dictionaries: use cross_counts()")
        return Counts(self._finished().cpu().numpy(), self._n1_a.numpy().copy(), self.n_tokens)

    def cross_counts(self) -> CrossCounts:
        """The counts between two dictionaries, without a copy: valid until the next update."""
        if self.n_b is None:
            raise MeasureError("this counter is within one dictionary: use counts()")
        n11 = self._finished().cpu().numpy()
        return CrossCounts(n11, self._n1_a.numpy().copy(), self._n1_b.numpy().copy(), self.n_tokens)

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` continues from, to the same integers."""
        return {
            "n11": self._finished().cpu().numpy(),
            "n1_a": self._n1_a.numpy(),
            "n1_b": self._n1_b.numpy(),
            "n_tokens": np.array(self.n_tokens),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`."""
        self._waiting, self._entries = [], 0
        self._n11 = torch.from_numpy(np.array(state["n11"])).to(self.device)
        self._n1_a = torch.from_numpy(np.array(state["n1_a"]))
        self._n1_b = torch.from_numpy(np.array(state["n1_b"])) if self.n_b else self._n1_a
        self.n_tokens = int(state["n_tokens"])

    def _add(self, a: Pattern, b: Pattern | None) -> None:
        self._grow(len(a.indptr) - 1, None if b is None else len(b.indptr) - 1)
        for pattern, n1 in ((a, self._n1_a), (b, self._n1_b)):
            if pattern is not None:
                n1 += torch.from_numpy(np.bincount(pattern.indices, minlength=len(n1)))
        fires = np.diff(a.indptr)
        if b is None:
            increments = float(fires @ (fires - 1)) / 2
            multiply_adds = len(fires) * self._n11.numel() / 2
        else:
            increments = float(fires @ np.diff(b.indptr))
            multiply_adds = float(len(fires) * self._n11.numel())
        if increments * DENSE_ADVANTAGE > multiply_adds:
            dense_b = None if b is None else _from_pattern(b, self._n11.shape[1])
            self._add_product(_from_pattern(a, self.n_a), dense_b)
            return
        self._waiting.append((a, b))
        self._entries += len(a.indices) + (0 if b is None else len(b.indices))
        if self._entries >= FLUSH_ENTRIES:
            self._flush()

    def _grow(self, n_tokens: int, n_tokens_b: int | None) -> None:
        if n_tokens_b not in (None, n_tokens):
            raise MeasureError(
                f"fired_a has {n_tokens} tokens and fired_b {n_tokens_b}: give the same tokens"
            )
        self.n_tokens += n_tokens
        if self.n_tokens > INT32_MAX and self._n11.dtype == torch.int32:
            self._n11 = self._n11.to(torch.int64)

    def _flush(self) -> None:
        if self._waiting:
            a = _joined([a for a, _ in self._waiting])
            b = None if self.n_b is None else _joined([b for _, b in self._waiting if b])
            add_pairs(self._n11.numpy(), a, b)
            self._waiting, self._entries = [], 0

    def _add_product(self, a: Tensor, b: Tensor | None) -> None:
        """Add Aᵀ B for dense bool (t, n_a) and (t, n_b); without b, Aᵀ A from the diagonal on."""
        # Zeros and ones are exact in bfloat16, and their sums up to 2^24 in the float32 result.
        on_gpu = self.device.type == "cuda"
        a = a.to(torch.bfloat16 if on_gpu else torch.float32)
        other = a if b is None else b.to(a.dtype)
        for tokens in torch.arange(len(a)).split(FLOAT32_EXACT):
            left, right = a[tokens[0] : tokens[-1] + 1], other[tokens[0] : tokens[-1] + 1]
            for row in range(0, self.n_a, _BLOCK_ROWS):
                first = row if b is None else 0
                rows, columns = left[:, row : row + _BLOCK_ROWS].T, right[:, first:]
                sums = (
                    torch.mm(rows, columns, out_dtype=torch.float32) if on_gpu else rows @ columns
                )
                self._n11[row : row + _BLOCK_ROWS, first:] += sums.to(self._n11.dtype)

    def _finished(self) -> Tensor:
        """The accumulator with everything counted; of one dictionary mirrored in place.

        Only the part above the diagonal is ever added up, so mirroring does no harm to counting.
        """
        self._flush()
        if self.n_b is None:
            for row in range(0, self.n_a, _BLOCK_ROWS):
                rows = slice(row, row + _BLOCK_ROWS)
                diagonal = self._n11[rows, rows].triu(1)
                self._n11[rows, rows] = diagonal + diagonal.T
                self._n11[row + _BLOCK_ROWS :, rows] = self._n11[rows, row + _BLOCK_ROWS :].T
            n1 = self._n1_a.to(self.device, self._n11.dtype)
            self._n11.diagonal().copy_(n1)
        return self._n11


def _pattern(fired: Any, n: int) -> Pattern:
    """Any accepted form of firing -> sorted CSR without repeats."""
    if isinstance(fired, Pattern):
        return fired
    stored = scipy.sparse.issparse(fired)
    if isinstance(fired, Tensor):
        fired = fired.detach().cpu()
        if fired.layout == torch.sparse_csr:
            parts = fired.values(), fired.col_indices(), fired.crow_indices()
            values, columns, rows = (part.numpy() for part in parts)
            fired, stored = (
                scipy.sparse.csr_array((values, columns, rows), tuple(fired.shape)),
                True,
            )
        else:
            fired = fired.numpy()
    if fired.ndim != 2 or fired.shape[1] != n:
        raise MeasureError(f"firing of shape {tuple(fired.shape)} does not fit: give (tokens, {n})")
    if not stored:
        if fired.dtype.kind not in "biu":
            raise MeasureError(f"firing is of type {fired.dtype}: give bool, such as acts > 0")
        dense = np.ascontiguousarray(fired) != 0
        return above(dense.view(np.uint8), np.zeros(n, np.uint8))[0]
    given = scipy.sparse.csr_array(fired)
    sparse = scipy.sparse.csr_array(
        (given.data != 0, given.indices, given.indptr), given.shape, copy=True
    )
    sparse.sum_duplicates()
    sparse.eliminate_zeros()
    return Pattern(sparse.indptr.astype(np.int64), sparse.indices.astype(index_type(n)))


def _dense(fired: Any, n: int) -> Tensor:
    """Any accepted form of firing -> dense bool (t, n)."""
    if isinstance(fired, Tensor) and fired.layout == torch.strided and fired.shape[1:] == (n,):
        return fired != 0
    return _from_pattern(_pattern(fired, n), n)


def _from_pattern(pattern: Pattern, n: int) -> Tensor:
    tokens = np.repeat(np.arange(len(pattern.indptr) - 1), np.diff(pattern.indptr))
    dense = torch.zeros(len(pattern.indptr) - 1, n, dtype=torch.bool)
    dense[torch.from_numpy(tokens), torch.from_numpy(pattern.indices.astype(np.int64))] = True
    return dense


def _joined(patterns: Sequence[Pattern]) -> Pattern:
    lengths = np.concatenate([np.diff(pattern.indptr) for pattern in patterns])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Pattern(indptr, np.concatenate([pattern.indices for pattern in patterns]))
