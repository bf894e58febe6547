"""The compiled loops, on arrays; :mod:`metasae_lib.train.kernels.compiled` says what they give.

What is `Any` is a named tuple of :mod:`metasae_lib.train.kernels.common`, or rates and decays.

numba's cache stays off: what it loads is optimised once more than what it has just compiled, and
differs in the last bits, so that a resumed training would not equal one that was never killed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

Array = np.ndarray

# Reassociation lets a dot product use vector lanes, contraction gives fused multiply-add. Both are
# fixed when the loop is compiled. The rest of "fastmath" stays off: NaN must remain NaN. Python's
# check for a division by zero would keep a loop from using vector lanes.
_FLOAT = {"reassoc", "contract", "nsz"}
LOOP: dict[str, Any] = {"nogil": True, "fastmath": _FLOAT, "error_model": "numpy"}
PARALLEL: dict[str, Any] = {**LOOP, "parallel": True}
ROWS = 32  # rows a thread takes at a time; also the fixed blocks of the encoder's b_dec gradient
TINY = 1e-30  # moments below this are zero: denormal numbers are slow


@njit(**PARALLEL)
def normalise_rows(x: Array, eps: float, z: Array, scale: Array) -> None:
    b, d = x.shape
    for r in prange(b):
        total = np.float32(0)
        for i in range(d):
            total += x[r, i]
        mean = total / np.float32(d)
        total = np.float32(0)
        for i in range(d):
            c = x[r, i] - mean
            z[r, i] = c
            total += c * c
        scale[r] = np.sqrt(total / np.float32(d - 1)) + np.float32(eps)
        inverse = np.float32(1) / scale[r]
        for i in range(d):
            z[r, i] *= inverse


@njit(**LOOP)
def _round_row(row: Array, out: Array) -> None:
    """Rounds float32 to the bits of the nearest bfloat16 (int16), ties to even."""
    bits = row.view(np.int32)
    for i in range(row.shape[0]):
        out[i] = (bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16


@njit(**PARALLEL)
def centre(z: Array, b_dec: Array, out: Array) -> None:
    b, d = z.shape
    for r in prange(b):
        row = np.empty(d, np.float32)
        for i in range(d):
            row[i] = z[r, i] - b_dec[i]
        _round_row(row, out[r])


@njit(**PARALLEL)
def missed(e_hat: Array, error: Array, low: Array, square: Array) -> None:
    """low = e_hat - error, each the bits of a bfloat16; square: of its rows before rounding."""
    b, d = error.shape
    for r in prange(b):
        row = np.empty(d, np.float32)
        bits = row.view(np.int32)
        for i in range(d):
            bits[i] = np.int32(e_hat[r, i]) << 16
        s = np.float32(0)
        for i in range(d):
            row[i] -= error[r, i]
            s += row[i] * row[i]
        square[r] = s
        _round_row(row, low[r])


@njit(**PARALLEL)
def where_kept(g: Array, acts: Array, sums: Array) -> None:
    """g: zero where acts is, both the bits of bfloat16; sums: of its columns, by blocks of rows."""
    b, m = g.shape
    for block in prange(sums.shape[0]):
        total = sums[block]
        total[:] = 0
        row = np.empty(m, np.float32)
        bits = row.view(np.int32)
        for r in range(block * ROWS, min(b, (block + 1) * ROWS)):
            for i in range(m):
                g[r, i] = g[r, i] if acts[r, i] != 0 else 0
            for i in range(m):
                bits[i] = np.int32(g[r, i]) << 16
            for i in range(m):
                total[i] += row[i]


@njit(**PARALLEL)
def count(patterns: Array, low: Array, counts: Array) -> None:
    """counts[r] = how many entries of row r reach the bound of their column."""
    for r in prange(patterns.shape[0]):
        total = 0
        for i in range(patterns.shape[1]):
            total += patterns[r, i] >= low[i]
        counts[r] = total


@njit(**PARALLEL)
def gather(patterns: Array, low: Array, start: Array, cols: Array, found: Array) -> None:
    """List those entries of every row from position start[r] on."""
    for r in prange(patterns.shape[0]):
        p = start[r]
        for i in range(patterns.shape[1]):
            if patterns[r, i] >= low[i]:
                cols[p] = i
                found[p] = patterns[r, i]
                p += 1


@njit(**LOOP)
def kth_largest(found: Array, k: int, low: int, high: int) -> tuple[int, int]:
    """(k-th largest pattern, how many are larger), by bisection of low <= pattern <= high."""
    middle = np.empty(1, found.dtype)  # compared in their own type and counted in 32 bits: faster
    while low < high:
        half = low + (high - low + 1) // 2
        middle[0] = half
        bound, total = middle[0], np.int32(0)
        for i in range(found.shape[0]):
            total = np.int32(total + (found[i] >= bound))
        if total >= k:
            low = half
        else:
            high = half - 1
    above = 0
    for i in range(found.shape[0]):
        above += found[i] > low
    return low, above


@njit(**LOOP)
def keep(found: Array, cols: Array, start: Array, cut: int, ties: int, row_ptr: Array) -> None:
    """Move what is above the cut-off, and the first few at it, to the front of both lists.

    row_ptr: where each row then begins.
    """
    q = 0
    for r in range(start.shape[0] - 1):
        row_ptr[r] = q
        for p in range(start[r], start[r + 1]):
            tied = found[p] == cut and ties > 0
            ties -= tied
            if found[p] > cut or tied:
                found[q], cols[q] = found[p], cols[p]
                q += 1
    row_ptr[start.shape[0] - 1] = q


@njit(**LOOP)
def by_feature(row_ptr: Array, cols: Array, col_ptr: Array, entries: Array, rows: Array) -> None:
    """The feature-major lists of a token-major one. col_ptr: (n+2,), its last place for nothing."""
    col_ptr[:] = 0
    for p in range(cols.shape[0]):
        col_ptr[cols[p] + 2] += 1
    for j in range(1, col_ptr.shape[0]):
        col_ptr[j] += col_ptr[j - 1]
    for r in range(row_ptr.shape[0] - 1):
        for p in range(row_ptr[r], row_ptr[r + 1]):
            q = col_ptr[cols[p] + 1]
            entries[q], rows[q] = p, r
            col_ptr[cols[p] + 1] = q + 1


@njit(**PARALLEL)
def row_topk(patterns: Array, features: Array, k: int, out: Array) -> None:
    high = np.iinfo(patterns.dtype).max
    m = features.shape[0]
    for r in prange(patterns.shape[0]):
        row = out[r]
        positive = 0
        for i in range(m):
            x = patterns[r, features[i]] if features[i] >= 0 else 0
            row[i] = max(x, 0)
            positive += x > 0
        if positive > k:
            cut, _ = kth_largest(row, k, 1, high)
            kept = 0
            for i in range(m):
                reaches = row[i] >= cut
                row[i] = row[i] if reaches else 0
                kept += reaches
            i = m
            while kept > k:  # ties
                i -= 1
                if row[i] == cut:
                    row[i] = 0
                    kept -= 1


@njit(**PARALLEL)
def residual(
    codes: Any, z: Array, W_dec: Array, b_dec: Array, ends: Array, error: Array, square: Array,
    dots: Array,
) -> None:  # fmt: skip
    row_ptr, cols, acts = codes.row_ptr, codes.cols, codes.acts
    b, d = z.shape
    last = ends.shape[0] - 1
    for block in prange((b + ROWS - 1) // ROWS):
        total = np.empty(d, np.float32)
        for t in range(block * ROWS, min(b, (block + 1) * ROWS)):
            for i in range(d):
                total[i] = z[t, i] - b_dec[i]
            end = row_ptr[t]
            for g in range(last + 1):
                p = end
                while end < row_ptr[t + 1] and cols[end] < ends[g]:
                    end += 1
                while p < end:
                    a, w = acts[p], W_dec[cols[p]]
                    if p + 1 < end:
                        a2, w2 = acts[p + 1], W_dec[cols[p + 1]]
                        for i in range(d):
                            total[i] -= a * w[i] + a2 * w2[i]
                    else:
                        for i in range(d):
                            total[i] -= a * w[i]
                    p += 2
                for i in range(d):
                    error[g, t, i] = total[i]
            s = np.float32(0)
            for i in range(d):
                s += total[i] * total[i]
            square[t] = s
            for g in range(last, 0, -1):
                for i in range(d):
                    error[g - 1, t, i] += error[g, t, i]
            if dots.shape[0] > 0:
                g = 0
                for p in range(row_ptr[t], row_ptr[t + 1]):
                    while cols[p] >= ends[g]:
                        g += 1
                    e, w = error[g, t], W_dec[cols[p]]
                    s = np.float32(0)
                    for i in range(d):
                        s += e[i] * w[i]
                    dots[p] = s


@njit(**LOOP)
def _adam_row(w: Array, m: Array, v: Array, g: Array, adam: Any) -> None:
    rate, root, beta1, beta2, eps = adam
    rate_, root_, eps_ = np.float32(rate), np.float32(root), np.float32(eps)
    new1, beta2_ = np.float32(1 - beta1), np.float32(beta2)
    new2, tiny, zero = np.float32(1 - beta2), np.float32(TINY), np.float32(0)
    for i in range(w.shape[0]):
        a = m[i] + (g[i] - m[i]) * new1
        c = v[i] * beta2_ + new2 * g[i] * g[i]
        a = a if abs(a) > tiny else zero
        c = c if c > tiny else zero
        m[i] = a
        v[i] = c
        w[i] -= rate_ * a / (np.sqrt(c) * root_ + eps_)


@njit(**PARALLEL)
def update_rows(
    weights: Any, batch: Any, extra: Any, pull: Any, adam: Any, unit: bool, low: Array,
    partial: Array,
) -> None:  # fmt: skip
    W_enc_T, W_dec, m_enc, v_enc, m_dec, v_dec = weights
    codes, dots, z, error, ends, b_dec, scale = batch
    acts, col_ptr, entries, rows = codes.acts, codes.col_ptr, codes.entries, codes.rows
    position, extra_dec, extra_enc, extra_pre = extra
    direction, pull_scale = pull
    n, d = W_dec.shape
    scale_ = np.float32(scale)
    for block in prange((n + ROWS - 1) // ROWS):
        g_dec = np.empty(d, np.float32)
        g_enc = np.empty(d, np.float32)
        part = partial[block]
        part[:] = 0
        g = 0
        for j in range(block * ROWS, min(n, (block + 1) * ROWS)):
            while j >= ends[g]:
                g += 1
            felt = error[g]
            w_dec, w_enc = W_dec[j], W_enc_T[j]
            g_dec[:] = 0
            g_enc[:] = 0
            g_pre = np.float32(0)
            # Two entries at a time: half the traffic to the sums.
            q, end = col_ptr[j], col_ptr[j + 1]
            while q < end:
                p, t = entries[q], rows[q]
                a, c = scale_ * acts[p], scale_ * dots[p]
                e_t, z_t = felt[t], z[t]
                g_pre += c
                if q + 1 < end:
                    p, t = entries[q + 1], rows[q + 1]
                    a2, c2 = scale_ * acts[p], scale_ * dots[p]
                    e_t2, z_t2 = felt[t], z[t]
                    g_pre += c2
                    for i in range(d):
                        g_dec[i] += a * e_t[i] + a2 * e_t2[i]
                        g_enc[i] += c * z_t[i] + c2 * z_t2[i]
                else:
                    for i in range(d):
                        g_dec[i] += a * e_t[i]
                        g_enc[i] += c * z_t[i]
                q += 2
            for i in range(d):
                g_enc[i] -= g_pre * b_dec[i]
            x = position[j]
            if x >= 0:
                g_pre += extra_pre[x]
                for i in range(d):
                    g_dec[i] += extra_dec[x, i]
                    g_enc[i] += extra_enc[x, i]
            if direction.shape[0] > 0:
                c = pull_scale[j]
                for i in range(d):
                    g_dec[i] += c * direction[j, i]
            for i in range(d):
                part[i] -= g_pre * w_enc[i]
            _adam_row(w_enc, m_enc[j], v_enc[j], g_enc, adam)
            if low.shape[0] > 0:
                _round_row(w_enc, low[j])
            along = np.float32(0)
            for i in range(d):
                along += g_dec[i] * w_dec[i]
            for i in range(d):
                g_dec[i] -= along * w_dec[i]
            _adam_row(w_dec, m_dec[j], v_dec[j], g_dec, adam)
            if unit:
                s = np.float32(0)
                for i in range(d):
                    s += w_dec[i] * w_dec[i]
                s = np.float32(1) / np.sqrt(s)
                for i in range(d):
                    w_dec[i] *= s


@njit(**PARALLEL)
def near_threshold(
    patterns: Array, low: Array, high: Array, error: Array, W_dec: Array, dots: Array, counts: Array
) -> None:
    b, n = patterns.shape
    d = error.shape[1]
    for block in prange((n + ROWS - 1) // ROWS):
        for t in range(b):
            for j in range(block * ROWS, min(n, (block + 1) * ROWS)):
                if low[j] <= patterns[t, j] < high[j]:
                    s = np.float32(0)
                    for i in range(d):
                        s += error[t, i] * W_dec[j, i]
                    dots[j] += s
                    counts[j] += 1
