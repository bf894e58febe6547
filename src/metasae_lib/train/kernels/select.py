"""Kernels after the encoder's product: which of its entries are kept."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.train.kernels.common import (
    LOOP,
    PARALLEL,
    Codes,
    DenseCodes,
    bit_patterns,
    threads_for,
)


@njit(**PARALLEL)
def _count_from(patterns: np.ndarray, low: int, counts: np.ndarray) -> None:
    """counts[r] = how many of row r are >= low."""
    n = patterns.shape[1]
    for r in prange(patterns.shape[0]):
        row = patterns[r]
        total = 0
        for i in range(n):
            total += row[i] >= low
        counts[r] = total


@njit(**PARALLEL)
def _gather_from(
    patterns: np.ndarray, low: int, start: np.ndarray, cols: np.ndarray, found: np.ndarray
) -> None:
    """List the entries >= low of every row from position start[r] on."""
    n = patterns.shape[1]
    for r in prange(patterns.shape[0]):
        row = patterns[r]
        p = start[r]
        for i in range(n):
            if row[i] >= low:
                cols[p] = i
                found[p] = row[i]
                p += 1


@njit(**LOOP)
def _kth_largest(found: np.ndarray, k: int, low: int, high: int) -> tuple[int, int]:
    """(k-th largest pattern, how many are larger), by bisection of low <= pattern <= high."""
    while low < high:
        middle = low + (high - low + 1) // 2
        total = 0
        for i in range(found.shape[0]):
            total += found[i] >= middle
        if total >= k:
            low = middle
        else:
            high = middle - 1
    above = 0
    for i in range(found.shape[0]):
        above += found[i] > low
    return low, above


@njit(**LOOP)
def _keep(
    start: np.ndarray,
    cols: np.ndarray,
    found: np.ndarray,
    cut: int,
    ties: int,
    row_ptr: np.ndarray,
    col_ptr: np.ndarray,
) -> int:
    """Compact the candidates to those > cut and the first `ties` equal to it; count by feature."""
    m = 0
    col_ptr[:] = 0
    for r in range(start.shape[0] - 1):
        row_ptr[r] = m
        for p in range(start[r], start[r + 1]):
            if found[p] > cut or (found[p] == cut and ties > 0):
                ties -= found[p] == cut
                cols[m] = cols[p]
                found[m] = found[p]
                col_ptr[cols[m] + 1] += 1
                m += 1
    row_ptr[-1] = m
    for j in range(col_ptr.shape[0] - 1):
        col_ptr[j + 1] += col_ptr[j]
    return m


@njit(**LOOP)
def _by_feature(
    row_ptr: np.ndarray,
    cols: np.ndarray,
    col_ptr: np.ndarray,
    entries: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Feature-major lists from token-major ones (a counting sort)."""
    fill = col_ptr[:-1].copy()
    for r in range(row_ptr.shape[0] - 1):
        for p in range(row_ptr[r], row_ptr[r + 1]):
            q = fill[cols[p]]
            fill[cols[p]] = q + 1
            entries[q] = p
            rows[q] = r


def batch_topk(pre: Tensor, k: int, bracket: int = 0) -> tuple[Codes, int]:
    """The ``k`` largest positive values of the whole matrix, ties by lowest flat index.

    Values a little below the last cut-off are listed as candidates and the exact cut-off is found
    among them; should fewer than ``k`` be there, the cut-off is bisected over the whole matrix.
    The result is the same either way.

    pre: (b, n) bfloat16 or float32, contiguous. k: entries to keep in all.
    bracket: what the last call returned, 0 at first. Returns the codes and the next bracket.
    """
    patterns = bit_patterns(pre)
    b, n = patterns.shape
    top = int(np.iinfo(patterns.dtype).max)
    counts = np.empty(b, np.int64)
    start = np.zeros(b + 1, np.int64)
    low = max(bracket, 1)
    with threads_for(b * n):
        _count_from(patterns, low, counts)
        if not k <= counts.sum() <= 4 * k:
            low, high = 1, top
            while low < high:
                middle = low + (high - low + 1) // 2
                _count_from(patterns, middle, counts)
                if counts.sum() >= k:
                    low = middle
                else:
                    high = middle - 1
            _count_from(patterns, low, counts)
        np.cumsum(counts, out=start[1:])
        cols = np.empty(start[-1], np.int32)
        found = np.empty(start[-1], patterns.dtype)
        _gather_from(patterns, low, start, cols, found)
    cut, above = _kth_largest(found, k, low, top)
    codes = _codes(start, cols, found, pre.dtype, n, cut, k - above)
    # One octave of values is 2^7 patterns of a bfloat16 and 2^23 of a float32: about 4% below.
    margin = 6 if pre.dtype == torch.bfloat16 else 6 << 16
    return codes, max(cut - margin, 1)


def _codes(
    start: np.ndarray,
    cols: np.ndarray,
    found: np.ndarray,
    dtype: torch.dtype,
    n: int,
    cut: int = 0,
    ties: int = 0,
) -> Codes:
    """Codes of the candidates above `cut` and the first `ties` equal to it (all by default).

    start: (b+1,) where each row's candidates begin in cols and found (patterns), both overwritten.
    """
    row_ptr = np.empty(len(start), np.int64)
    col_ptr = np.empty(n + 1, np.int64)
    m = _keep(start, cols, found, cut, ties, row_ptr, col_ptr)
    entries = np.empty(m, np.int32)
    rows = np.empty(m, np.int32)
    _by_feature(row_ptr, cols, col_ptr, entries, rows)
    acts = torch.from_numpy(found[:m]).view(dtype).float().numpy()
    return Codes(row_ptr, cols[:m], acts, col_ptr, entries, rows)


def top_mask(values: Tensor, k: int) -> Tensor:
    """Which ``k`` entries along the last dimension are the largest; ties by lowest index.

    values: (..., n) any float type. Returns (..., n) bool with exactly min(k, n) true along the
    last dimension.
    """
    k = min(k, values.shape[-1])
    cut = values.topk(k, dim=-1, sorted=True).values[..., -1:]
    above = values > cut
    tied = values == cut
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def batch_topk_plain(pre: Tensor, k: int, bracket: int = 0) -> tuple[DenseCodes, int]:
    """Plain form of :func:`batch_topk`; the bracket is not used."""
    positive = pre.relu()
    keep = top_mask(positive.flatten(), k).view_as(pre)
    return DenseCodes(torch.where(keep, positive, torch.zeros_like(positive))), bracket


@njit(**PARALLEL)
def _row_topk(patterns: np.ndarray, features: np.ndarray, k: int, out: np.ndarray) -> None:
    high = np.iinfo(patterns.dtype).max
    m = features.shape[0]
    for r in prange(patterns.shape[0]):
        row = out[r]
        positive = 0
        for i in range(m):
            x = patterns[r, features[i]]
            row[i] = max(x, 0)
            positive += x > 0
        if positive > k:
            cut, above = _kth_largest(row, k, 1, high)
            ties = k - above
            for i in range(m):
                if row[i] == cut and ties > 0:
                    ties -= 1
                elif row[i] <= cut:
                    row[i] = 0


def row_topk(pre: Tensor, features: Tensor, k: int) -> Tensor:
    """The ``k`` largest positive pre-activations of each input among some features.

    pre: (b, n) bfloat16 or float32. features: (m,) int64. Returns (b, m) of the same type, zero
    where not kept; ties by lowest index.
    """
    out = torch.empty(pre.shape[0], features.shape[0], dtype=pre.dtype)
    with threads_for(out.numel() * 8):
        _row_topk(bit_patterns(pre), features.numpy(), k, bit_patterns(out))
    return out


def row_topk_plain(pre: Tensor, features: Tensor, k: int) -> Tensor:
    """Plain form of :func:`row_topk`; a feature -1 is none, its column zero."""
    values = torch.where(features < 0, 0, pre[:, features].relu())
    return torch.where(top_mask(values, k), values, torch.zeros_like(values))


def fired(codes: Codes) -> Tensor:
    """Which features have a selected activation, (n,) bool."""
    return torch.from_numpy(np.diff(codes.col_ptr) > 0)


def fired_plain(codes: DenseCodes) -> Tensor:
    """Plain form of :func:`fired`."""
    return (codes.acts > 0).any(0)


@njit(**PARALLEL)
def _count_above(patterns: np.ndarray, low: np.ndarray, counts: np.ndarray) -> None:
    """counts[r] = how many entries of row r reach the bound of their column."""
    for r in prange(patterns.shape[0]):
        total = 0
        for i in range(patterns.shape[1]):
            total += patterns[r, i] >= low[i]
        counts[r] = total


@njit(**PARALLEL)
def _gather_above(
    patterns: np.ndarray, low: np.ndarray, start: np.ndarray, cols: np.ndarray, found: np.ndarray
) -> None:
    """List those entries of every row from position start[r] on."""
    for r in prange(patterns.shape[0]):
        p = start[r]
        for i in range(patterns.shape[1]):
            if patterns[r, i] >= low[i]:
                cols[p] = i
                found[p] = patterns[r, i]
                p += 1


def least_above(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The least pattern of a type above each value, which must not be negative."""
    bits = bit_patterns(values)
    # A bfloat16 is the upper half of a float32.
    return (bits >> 16 if dtype == torch.bfloat16 else bits) + 1


def above_threshold(pre: Tensor, threshold: Tensor) -> Codes:
    """The pre-activations above their feature's threshold (JumpReLU).

    pre: (b, n) bfloat16 or float32, contiguous. threshold: (n,) float32, at least 0.
    """
    patterns, low = bit_patterns(pre), least_above(threshold, pre.dtype)
    counts = np.empty(len(patterns), np.int64)
    with threads_for(patterns.size):
        _count_above(patterns, low, counts)
        start = np.concatenate([[0], np.cumsum(counts)])
        cols = np.empty(start[-1], np.int32)
        found = np.empty(start[-1], patterns.dtype)
        _gather_above(patterns, low, start, cols, found)
    return _codes(start, cols, found, pre.dtype, patterns.shape[1])


def above_threshold_plain(pre: Tensor, threshold: Tensor) -> DenseCodes:
    """Plain form of :func:`above_threshold`."""
    return DenseCodes(torch.where(pre > threshold, pre, 0))
