"""Counting kernels: BatchTopK fires few features a token, so pairs are counted, not multiplied.

A firing `Pattern` is a CSR pair: `indptr` (t+1,) int64 and `indices` (nnz,) of `index_type(n)`,
the features that fire on each token in ascending order. The tests hold every kernel against its
plain NumPy form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numba import njit, prange
from numpy.typing import NDArray

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
def _above(values: Array, threshold: Array, features: Array) -> tuple[Array, Array, Array]:
    counts = np.zeros(len(values) + 1, np.int64)
    for t in prange(len(values)):
        n = 0
        for j in range(len(features)):
            n += values[t, j] > threshold[j]
        counts[t + 1] = n
    indptr = np.cumsum(counts)
    indices = np.empty(indptr[-1], features.dtype)
    kept = np.empty(indptr[-1], values.dtype)
    for t in prange(len(values)):
        p = indptr[t]
        for j in range(len(features)):
            if values[t, j] > threshold[j]:
                indices[p] = features[j]
                kept[p] = values[t, j]
                p += 1
    return indptr, indices, kept


def above(values: Array, threshold: Array) -> tuple[Pattern, Array]:
    """(t, n) values and (n,) thresholds -> what exceeds them: its pattern and the values."""
    n = values.shape[1]
    indptr, indices, kept = _above(values, threshold, np.arange(n, dtype=index_type(n)))
    return Pattern(indptr, indices), kept


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
def count_below(values: Array, low: float, counts: Array, largest: Array) -> None:
    """Of (t, n) values in (0, low]: add their number by feature to counts (n,) int64, and raise
    largest (n,) float32 to the largest of them; in place."""
    n_features = len(counts)
    width = 64  # features a thread takes at a time: a few cache lines of every token
    for block in prange((n_features + width - 1) // width):
        for t in range(values.shape[0]):
            for j in range(block * width, min(n_features, (block + 1) * width)):
                value = values[t, j]
                inside = (value > 0) & (value <= low)
                counts[j] += inside
                largest[j] = max(largest[j], value if inside else np.float32(0))


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
