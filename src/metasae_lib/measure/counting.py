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

from metasae_lib.measure.patterns import Array, Pattern, add_pairs, index_type, reaching
from metasae_lib.study import MeasureError

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
        self._sizes = (n_a,) if n_b is None else (n_a, n_b)
        self._n1 = [np.zeros(n, np.int64) for n in self._sizes]
        self._n11 = torch.zeros(n_a, self._sizes[-1], dtype=torch.int32, device=self.device)
        self._waiting: list[list[Pattern]] = []
        self._entries = 0  # of what waits

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
        on_cpu = self.device.type == "cpu"
        given = zip((fired_a, fired_b), self._sizes, strict=False)
        if on_cpu:
            patterns = [_pattern(fired, n) for fired, n in given]
            lengths = [pattern.n_tokens for pattern in patterns]
        else:
            dense = [_dense(fired, n).to(self.device) for fired, n in given]
            lengths = [len(fired) for fired in dense]
        if lengths[0] != lengths[-1]:
            raise MeasureError(
                f"fired_a has {lengths[0]} tokens and fired_b {lengths[1]}: give the same tokens"
            )
        self.n_tokens += lengths[0]
        if self.n_tokens > INT32_MAX:
            self._n11 = self._n11.to(torch.int64)
        if on_cpu:
            self._add(patterns)
        else:
            for n1, fired in zip(self._n1, dense, strict=True):
                n1 += fired.sum(0).cpu().numpy()
            self._add_product(dense)

    @property
    def n11(self) -> Tensor:
        """Exact counts, a new int64 tensor: (n_a, n_a) symmetric with n1 on the diagonal, or
        (n_a, n_b)."""
        return self._finished().to(torch.int64)

    @property
    def n1_a(self) -> Tensor:
        """(n_a,) int64: tokens on which each feature of the first dictionary fires."""
        return torch.from_numpy(self._n1[0].copy())

    @property
    def n1_b(self) -> Tensor:
        """(n_b,) int64 for the second dictionary; that of the first if there is one only."""
        return torch.from_numpy(self._n1[-1].copy())

    def counts(self) -> Counts:
        """The counts within one dictionary, without a copy: valid until the next update."""
        if self.n_b is not None:
            raise MeasureError("this counter is between two dictionaries: use cross_counts()")
        return Counts(self._finished().cpu().numpy(), self._n1[0].copy(), self.n_tokens)

    def cross_counts(self) -> CrossCounts:
        """The counts between two dictionaries, without a copy: valid until the next update."""
        if self.n_b is None:
            raise MeasureError("this counter is within one dictionary: use counts()")
        n1_a, n1_b = (n1.copy() for n1 in self._n1)
        return CrossCounts(self._finished().cpu().numpy(), n1_a, n1_b, self.n_tokens)

    def state(self) -> dict[str, Array]:
        """Arrays that `restore` continues from, to the same integers."""
        return {
            "n11": self._finished().cpu().numpy(),
            "n1_a": self._n1[0],
            "n1_b": self._n1[-1],
            "n_tokens": np.array(self.n_tokens),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`."""
        self._waiting, self._entries = [], 0
        self._n11 = torch.from_numpy(np.array(state["n11"])).to(self.device)
        self._n1 = [
            np.array(state[key]) for key, _ in zip(("n1_a", "n1_b"), self._n1, strict=False)
        ]
        self.n_tokens = int(state["n_tokens"])

    def _add(self, patterns: list[Pattern]) -> None:
        for n1, pattern in zip(self._n1, patterns, strict=True):
            n1 += np.bincount(pattern.indices, minlength=len(n1))
        a, b = (np.diff(pattern.indptr) for pattern in (patterns[0], patterns[-1]))
        increments = float(a @ (b if self.n_b else a - 1))
        if increments * DENSE_ADVANTAGE > float(len(a) * self._n11.numel()):
            self._add_product([_dense(*each) for each in zip(patterns, self._sizes, strict=True)])
            return
        self._waiting.append(patterns)
        self._entries += sum(len(each.indices) for each in patterns)
        if self._entries >= FLUSH_ENTRIES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            add_pairs(self._n11.numpy(), *map(_joined, zip(*self._waiting, strict=True)))
            self._waiting, self._entries = [], 0

    def _add_product(self, fired: list[Tensor]) -> None:
        """Add Aᵀ B for dense bool (t, n_a) and (t, n_b); without the second, Aᵀ A from the
        diagonal on."""
        # Zeros and ones are exact in bfloat16, and their sums up to 2^24 in the float32 result.
        on_gpu = self.device.type == "cuda"
        exact = [each.to(torch.bfloat16 if on_gpu else torch.float32) for each in fired]
        options: dict[str, Any] = {"out_dtype": torch.float32} if on_gpu else {}
        for a, b in zip(exact[0].split(FLOAT32_EXACT), exact[-1].split(FLOAT32_EXACT), strict=True):
            for row in range(0, self.n_a, _BLOCK_ROWS):
                rows, first = slice(row, row + _BLOCK_ROWS), 0 if self.n_b else row
                sums = torch.mm(a[:, rows].T, b[:, first:], **options)
                self._n11[rows, first:] += sums.to(self._n11.dtype)

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
            self._n11.diagonal().copy_(torch.from_numpy(self._n1[0]))
        return self._n11


def _pattern(fired: Any, n: int) -> Pattern:
    """Any accepted form of firing -> sorted CSR without repeats."""
    if isinstance(fired, Pattern):
        return fired
    if isinstance(fired, Tensor):
        fired = fired.detach().cpu()
        if fired.layout != torch.strided:
            fired = fired.to_sparse_csr()
            parts = fired.values(), fired.col_indices(), fired.crow_indices()
            arrays = tuple(part.numpy() for part in parts)
            fired = scipy.sparse.csr_array(arrays, tuple(fired.shape))
        else:
            fired = fired.numpy()
    if fired.ndim != 2 or fired.shape[1] != n:
        raise MeasureError(f"firing of shape {tuple(fired.shape)} does not fit: give (tokens, {n})")
    stored = scipy.sparse.issparse(fired)
    if not stored:
        if fired.dtype.kind not in "biu":
            raise MeasureError(f"firing is of type {fired.dtype}: give bool, such as acts > 0")
        dense = np.ascontiguousarray(fired) != 0
        return reaching(dense.view(np.uint8), np.ones(n, np.uint8))[0]
    sparse = scipy.sparse.csr_array(fired).astype(bool)
    sparse.sum_duplicates()
    sparse.eliminate_zeros()
    return Pattern(sparse.indptr.astype(np.int64), sparse.indices.astype(index_type(n)))


def _dense(fired: Any, n: int) -> Tensor:
    """Any accepted form of firing -> dense bool (t, n)."""
    plain = isinstance(fired, Tensor) and fired.layout == torch.strided
    if plain and fired.dtype == torch.bool and fired.shape[1:] == (n,):
        return fired
    pattern = _pattern(fired, n)
    return torch.from_numpy(pattern.matrix(n, np.ones(len(pattern.indices), bool)).toarray())


def _joined(patterns: Sequence[Pattern]) -> Pattern:
    lengths = np.concatenate([np.diff(pattern.indptr) for pattern in patterns])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Pattern(indptr, np.concatenate([pattern.indices for pattern in patterns]))
