"""Counting kernels: BatchTopK fires few features a token, so pairs are counted, not multiplied.

A firing `Pattern` is a CSR pair: `indptr` (t+1,) int64 and `indices` (nnz,) of `index_type(n)`,
the features that fire on each token in ascending order. Every kernel has its plain NumPy form
beside it; the tests hold one against the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[Any]


class Pattern(NamedTuple):
    """Which features fire on which tokens, token by token."""

    indptr: Array
    indices: Array


def index_type(n_features: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type for feature numbers: lists that fit the cache decide the speed."""
    return np.uint16 if n_features <= 2**16 else np.uint32


@njit(parallel=True, cache=True)
def _count_above(values: Array, threshold: Array, counts: Array) -> None:
    for t in prange(values.shape[0]):
        n = 0
        for j in range(values.shape[1]):
            n += values[t, j] > threshold[j]
        counts[t] = n


@njit(parallel=True, cache=True)
def _fill_above(
    values: Array, threshold: Array, indptr: Array, indices: Array, kept: Array
) -> None:
    for t in prange(values.shape[0]):
        p = indptr[t]
        for j in range(values.shape[1]):
            if values[t, j] > threshold[j]:
                indices[p] = j
                kept[p] = values[t, j]
                p += 1


def above(values: Array, threshold: Array) -> tuple[Pattern, Array]:
    """(t, n) values and (n,) thresholds -> what exceeds them: its pattern and the values."""
    counts = np.empty(len(values), np.int64)
    _count_above(values, threshold, counts)
    indptr = _offsets(counts)
    indices = np.empty(indptr[-1], index_type(values.shape[1]))
    kept = np.empty(indptr[-1], values.dtype)
    _fill_above(values, threshold, indptr, indices, kept)
    return Pattern(indptr, indices), kept


def above_plain(values: Array, threshold: Array) -> tuple[Pattern, Array]:
    """`above` in plain NumPy."""
    fires = values > threshold
    indices = np.nonzero(fires)[1].astype(index_type(values.shape[1]))
    return Pattern(_offsets(fires.sum(axis=1)), indices), values[fires]


@njit(parallel=True, cache=True)
def _restrict(
    indptr: Array,
    indices: Array,
    values: Array,
    threshold: Array,
    renumber: Array,
    rows: Array,
    kept: Array,
    counting: bool,
) -> None:
    for t in prange(len(indptr) - 1):
        p = np.int64(0) if counting else rows[t]
        for e in range(indptr[t], indptr[t + 1]):
            i = indices[e]
            if values[e] > threshold[i] and renumber[i] >= 0:
                if not counting:
                    kept[p] = renumber[i]
                p += 1
        if counting:
            rows[t] = p


def restrict(pattern: Pattern, values: Array, threshold: Array, renumber: Array) -> Pattern:
    """The part of a pattern whose values exceed higher thresholds, with features renumbered.

    renumber: (n,) int64, the new number of each feature in ascending order, or -1 to leave it out.
    """
    counts = np.empty(len(pattern.indptr) - 1, np.int64)
    none = np.empty(0, pattern.indices.dtype)
    _restrict(*pattern, values, threshold, renumber, counts, none, True)
    indptr = _offsets(counts)
    kept = np.empty(indptr[-1], pattern.indices.dtype)
    _restrict(*pattern, values, threshold, renumber, indptr, kept, False)
    return Pattern(indptr, kept)


def restrict_plain(pattern: Pattern, values: Array, threshold: Array, renumber: Array) -> Pattern:
    """`restrict` in plain NumPy."""
    keep = (values > threshold[pattern.indices]) & (renumber[pattern.indices] >= 0)
    kept = renumber[pattern.indices[keep]].astype(pattern.indices.dtype)
    return Pattern(_offsets(keep)[pattern.indptr], kept)


@njit(cache=True)
def _entries_by_feature(
    indptr: Array, indices: Array, n_features: int
) -> tuple[Array, Array, Array]:
    """A counting sort: where each feature's entries begin, and each entry's position and token."""
    pointer = np.zeros(n_features + 1, np.int64)
    for p in range(len(indices)):
        pointer[indices[p] + 1] += 1
    for i in range(n_features):
        pointer[i + 1] += pointer[i]
    position = np.empty(len(indices), np.int64)
    token = np.empty(len(indices), np.int64)
    cursor = pointer[:-1].copy()
    for t in range(len(indptr) - 1):
        for p in range(indptr[t], indptr[t + 1]):
            i = indices[p]
            position[cursor[i]] = p
            token[cursor[i]] = t
            cursor[i] += 1
    return pointer, position, token


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
    pointer, position, token = _entries_by_feature(a.indptr, a.indices, n11.shape[0])
    if b is None:
        start, stop, columns = position + 1, a.indptr[token + 1], a.indices
    else:
        start, stop, columns = b.indptr[token], b.indptr[token + 1], b.indices
    _add_pairs(pointer, start, stop, columns, n11)


def add_pairs_plain(n11: Array, a: Pattern, b: Pattern | None = None) -> None:
    """`add_pairs` in plain NumPy."""
    for t in range(len(a.indptr) - 1):
        i = a.indices[a.indptr[t] : a.indptr[t + 1]]
        if b is None:
            for p in range(len(i)):
                n11[i[p], i[p + 1 :]] += 1
        else:
            n11[np.ix_(i, b.indices[b.indptr[t] : b.indptr[t + 1]])] += 1


@njit(parallel=True, cache=True)
def _count_below(values: Array, low: float, counts: Array, largest: Array) -> None:
    n_features = len(counts)
    width = 64  # features a thread takes at a time: a few cache lines of every token
    for block in prange((n_features + width - 1) // width):
        for t in range(values.shape[0]):
            for j in range(block * width, min(n_features, (block + 1) * width)):
                value = values[t, j]
                inside = (value > 0) & (value <= low)
                counts[j] += inside
                largest[j] = max(largest[j], value if inside else np.float32(0))


def count_below(values: Array, low: float, counts: Array, largest: Array) -> None:
    """Of (t, n) values in (0, low]: add their number by feature to counts (n,) int64, and raise
    largest (n,) float32 to the largest of them; in place."""
    _count_below(values, low, counts, largest)


def count_below_plain(values: Array, low: float, counts: Array, largest: Array) -> None:
    """`count_below` in plain NumPy."""
    inside = (values > 0) & (values <= low)
    counts += inside.sum(axis=0)
    np.maximum(largest, np.where(inside, values, 0).max(axis=0), out=largest)


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
