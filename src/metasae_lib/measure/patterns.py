"""Counting kernels: BatchTopK fires few features a token, so pairs are counted, not multiplied.

A firing `Pattern` is a CSR pair: `indptr` (t+1,) int64 and `indices` (nnz,) of `index_type(n)`,
the features that fire on each token in ascending order. The tests hold every kernel against its
plain NumPy form. Values are compared as integers, which are ordered as floats from zero on are: in
the type in which they were made, and by loops whose results do not depend on how they are compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from metasae_lib.train.kernels.compiled import bits_of, least_above

Array = NDArray[Any]


class Pattern(NamedTuple):
    """Which features fire on which tokens, token by token."""

    indptr: Array
    indices: Array

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.indptr) - 1

    def where(self, keep: Array) -> Pattern:
        """Only the entries of which `keep`, (nnz,) bool, is true."""
        return Pattern(_offsets(keep)[self.indptr], self.indices[keep])

    def matrix(self, n_features: int, values: Array) -> scipy.sparse.csr_array:
        """(t, n_features) with `values`, (nnz,), where a feature fires."""
        shape = self.n_tokens, n_features
        return scipy.sparse.csr_array((values, self.indices, self.indptr), shape)


def index_type(n_features: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type for feature numbers: lists that fit the cache decide the speed."""
    return np.uint16 if n_features <= 2**16 else np.uint32


@njit(parallel=True, cache=True)
def _reaching(patterns: Array, low: Array, features: Array) -> tuple[Array, Array, Array]:
    counts = np.zeros(len(patterns) + 1, np.int64)
    for t in prange(len(patterns)):
        n = 0
        for j in range(len(low)):
            n += patterns[t, j] >= low[j]
        counts[t + 1] = n
    indptr = np.cumsum(counts)
    indices = np.empty(indptr[-1], features.dtype)
    kept = np.empty(indptr[-1], patterns.dtype)
    for t in prange(len(patterns)):
        p = indptr[t]
        for j in range(len(low)):
            if patterns[t, j] >= low[j]:
                indices[p] = features[j]
                kept[p] = patterns[t, j]
                p += 1
    return indptr, indices, kept


def reaching(patterns: Array, low: Array) -> tuple[Pattern, Array]:
    """(t, n) integers and (n,) bounds of their type -> what reaches its bound: its pattern and the
    integers."""
    n = patterns.shape[1]
    indptr, indices, kept = _reaching(patterns, low, np.arange(n, dtype=index_type(n)))
    return Pattern(indptr, indices), kept


def above(values: Tensor, threshold: Tensor) -> tuple[Pattern, Array]:
    """What exceeds its threshold: its pattern, and the values in float32.

    values: (t, n) bfloat16 or float32, contiguous, on the CPU. threshold: (n,) float32, at least 0.
    """
    pattern, kept = reaching(bits_of(values).numpy(), least_above(threshold, values.dtype).numpy())
    return pattern, torch.from_numpy(kept).view(values.dtype).float().numpy()


@njit(parallel=True, cache=True)
def _add_pairs(pointer: Array, start: Array, stop: Array, columns: Array, n11: Array) -> None:
    n = len(pointer) - 1
    for q in prange(n):
        # Threads get contiguous q. Of an upper triangle the first rows are the long ones, so
        # rows from both ends alternate to share the work.
        i = q // 2 if q % 2 == 0 else n - 1 - q // 2
        row = n11[i]
        for e in range(pointer[i], pointer[i + 1]):
            for p in range(start[e], stop[e]):
                row[columns[p]] += 1


def add_pairs(n11: Array, a: Pattern, b: Pattern | None = None) -> None:
    """Add to n11[i, j] the tokens on which i of `a` and j of `b` fire; in place.

    Without `b`: pairs i < j of one dictionary, the upper triangle alone. A row of counts is
    written by one thread, so the result does not depend on the number of threads.
    """
    # Where each feature's entries begin, and each entry's position and token.
    by_feature = a.matrix(len(n11), np.arange(len(a.indices))).tocsc()
    position, token = by_feature.data, by_feature.indices
    start, other = (position + 1, a) if b is None else (b.indptr[token], b)
    _add_pairs(by_feature.indptr, start, other.indptr[token + 1], other.indices, n11)


@njit(parallel=True, cache=True)
def _count_below(patterns: Array, bounds: Any, counts: Array, largest: Array) -> int:
    zero, low, exponent = bounds
    n, width = len(counts), 256  # features a thread takes at a time
    n_blocks = (n + width - 1) // width
    tops = np.zeros(n_blocks, np.int64)
    for block in prange(n_blocks):
        first = block * width
        size = min(n, first + width) - first
        inside, most = np.zeros(size, np.int32), np.zeros(size, patterns.dtype)
        top = np.zeros(size, patterns.dtype)
        for t in range(len(patterns)):
            part = patterns[t, first : first + size]
            for j in range(size):
                value = part[j]
                below = value if value <= low else zero
                inside[j] += below > zero
                most[j] = max(most[j], below)
                top[j] = max(top[j], value & exponent)
        counts[first : first + size] += inside
        largest[first : first + size] = most
        tops[block] = top.max()
    return int(tops.max())


def count_below(values: Tensor, low: float, counts: Array, largest: Array) -> bool:
    """Of (t, n) values in (0, low]: add their number by feature to counts (n,) int64, and raise
    largest (n,) float32 to the largest of them; in place. False if a value is not finite.

    values: bfloat16 or float32, contiguous, on the CPU.
    """
    patterns = bits_of(values).numpy()
    kind = patterns.dtype.type
    bound = int(least_above(torch.tensor([low], dtype=torch.float32), values.dtype)) - 1
    exponent = int(bits_of(torch.tensor([torch.inf], dtype=values.dtype)))
    found = np.empty_like(patterns, shape=len(counts))
    top = _count_below(patterns, (kind(0), kind(bound), kind(exponent)), counts, found)
    np.maximum(largest, torch.from_numpy(found).view(values.dtype).float().numpy(), out=largest)
    return bool(top < exponent)


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
