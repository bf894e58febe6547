"""Counting kernels: BatchTopK fires few features a token, so pairs are counted, never multiplied.

A firing pattern is a CSR pair: `indptr` (t+1,) int64 and `indices` (nnz,) int32, the features
that fire on token t in ascending order. Every kernel has its plain NumPy form beside it; the tests
hold one against the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Ints = NDArray[np.int64] | NDArray[np.int32]
Pattern = tuple[NDArray[np.int64], NDArray[np.int32]]


@njit(parallel=True, cache=True)
def _count_above(values, threshold, counts):  # type: ignore[no-untyped-def]  # pragma: no cover
    for t in prange(values.shape[0]):
        n = 0
        for j in range(values.shape[1]):
            n += values[t, j] > threshold[j]
        counts[t] = n


@njit(parallel=True, cache=True)
def _fill_above(values, threshold, indptr, indices, kept):  # type: ignore[no-untyped-def]  # pragma: no cover
    for t in prange(values.shape[0]):
        p = indptr[t]
        for j in range(values.shape[1]):
            if values[t, j] > threshold[j]:
                indices[p] = j
                kept[p] = values[t, j]
                p += 1


def above(
    values: NDArray[Any], threshold: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """(t, n) values and (n,) thresholds -> indptr, indices and the values that exceed them."""
    counts = np.empty(len(values), np.int64)
    _count_above(values, threshold, counts)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    indices, kept = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], values.dtype)
    _fill_above(values, threshold, indptr, indices, kept)
    return indptr, indices, kept


def above_plain(
    values: NDArray[Any], threshold: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """`above` in plain NumPy."""
    fires = values > threshold
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(fires.sum(axis=1))])
    return indptr, np.nonzero(fires)[1].astype(np.int32), values[fires]


@njit(cache=True)
def _entries_by_feature(indptr, indices, n_features):  # type: ignore[no-untyped-def]  # pragma: no cover
    """A counting sort: where each feature's entries begin, and each entry's position and token."""
    pointer = np.zeros(n_features + 1, np.int64)
    for p in range(len(indices)):
        pointer[indices[p] + 1] += 1
    for i in range(n_features):
        pointer[i + 1] += pointer[i]
    position, token = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
    cursor = pointer[:-1].copy()
    for t in range(len(indptr) - 1):
        for p in range(indptr[t], indptr[t + 1]):
            i = indices[p]
            position[cursor[i]] = p
            token[cursor[i]] = t
            cursor[i] += 1
    return pointer, position, token


@njit(parallel=True, cache=True)
def _add_pairs(pointer, start, stop, columns, n11):  # type: ignore[no-untyped-def]  # pragma: no cover
    n = len(pointer) - 1
    for q in prange(n):
        # Threads get contiguous q; of an upper triangle the first rows are the long ones, so
        # rows from both ends alternate to share the work.
        i = q // 2 if q % 2 == 0 else n - 1 - q // 2
        row = n11[i]
        for e in range(pointer[i], pointer[i + 1]):
            for p in range(start[e], stop[e]):
                row[columns[p]] += 1


def add_pairs(n11: Ints, a: Pattern, b: Pattern | None = None) -> None:
    """Add to n11[i, j] the tokens on which i of `a` and j of `b` fire; in place.

    Without `b`: pairs i < j of one dictionary, the upper triangle alone. One row of counts is
    written at a time by one thread, so the result does not depend on the number of threads.
    """
    pointer, position, token = _entries_by_feature(*a, n11.shape[0])
    if b is None:
        start, stop, columns = position + 1, a[0][token + 1], a[1]
    else:
        start, stop, columns = b[0][token], b[0][token + 1], b[1]
    _add_pairs(pointer, start, stop, columns, n11)


def add_pairs_plain(n11: Ints, a: Pattern, b: Pattern | None = None) -> None:
    """`add_pairs` in plain NumPy."""
    for t in range(len(a[0]) - 1):
        i = a[1][a[0][t] : a[0][t + 1]]
        if b is None:
            for p in range(len(i)):
                n11[i[p], i[p + 1 :]] += 1
        else:
            n11[np.ix_(i, b[1][b[0][t] : b[0][t + 1]])] += 1
