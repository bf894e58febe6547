"""The inner loops of a training step: exact batch top-k, sparse decoding, fused row updates.

BatchTopK keeps ``k`` of ``n`` activations per token, so that all of a training step but the encoder
product needs only those. On a CPU the loops below are compiled by numba; each stands beside its
plain torch form, which does the same with dense matrices: it is what runs on a GPU and what the
compiled form is tested against.

Every output row is summed by one thread in a fixed order: the result does not depend on timing.

Shapes: ``b`` inputs (tokens, or decoder rows for a meta dictionary), ``d`` dimensions, ``n``
features. ``W_enc_T`` is the encoder stored feature by feature, (n, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import get_num_threads, njit, prange, set_num_threads
from torch import Tensor

# Reassociation lets a dot product use vector lanes, contraction gives fused multiply-add. Both are
# fixed when the loop is compiled. The rest of "fastmath" stays off: NaN must remain NaN. Python's
# check for a division by zero would keep a loop from using vector lanes.
# numba's cache stays off: what it loads is optimised once more than what it has just compiled, and
# differs in the last bits, so that a resumed training would not equal one that was never killed.
_FLOAT = {"reassoc", "contract", "nsz"}
_LOOP: dict[str, Any] = {
    "nogil": True,
    "fastmath": _FLOAT,
    "error_model": "numpy",
}
_PARALLEL: dict[str, Any] = {**_LOOP, "parallel": True}
_ROWS = 32  # rows a thread takes at a time; also the fixed blocks of the encoder's b_dec gradient
_SERIAL = 1_000_000  # loops of fewer operations run on one thread: waking others costs more
_TINY = 1e-30  # moments below this are zero: denormal numbers are slow


class Codes(NamedTuple):
    """The selected activations of a batch, listed by token and by feature."""

    row_ptr: np.ndarray  # (b+1,) int64: the entries of token t are row_ptr[t]:row_ptr[t+1]
    cols: np.ndarray  # (m,) int32: feature of each entry, ascending within a token
    acts: np.ndarray  # (m,) float32: its activation, > 0
    col_ptr: np.ndarray  # (n+1,) int64: the entries of feature j in `entries`
    entries: np.ndarray  # (m,) int32: position in the token-major lists, tokens ascending
    rows: np.ndarray  # (m,) int32: token of each feature-major entry


class DenseCodes(NamedTuple):
    """The selected activations as a dense matrix (the plain form of :class:`Codes`)."""

    acts: Tensor  # (b, n), zero where not selected


class Extra(NamedTuple):
    """A gradient that some rows of the dictionary receive besides that of the L2 loss."""

    position: Tensor  # (n,) int32: row of the matrices below that belongs to a feature, or -1
    W_dec: Tensor  # (m, d) float32: gradient of the decoder rows
    W_enc_T: Tensor  # (m, d) float32: gradient of the encoder
    pre: Tensor  # (m,) float32: gradient of the pre-activations, summed over the batch


class Pull(NamedTuple):
    """The penalty's gradient on decoder rows: ``scale[i] * direction[i]`` (Eq. 2-3)."""

    direction: Tensor  # (n, d) float32
    scale: Tensor  # (n,) float32


class Adam(NamedTuple):
    """One step of ``torch.optim.Adam`` (no weight decay); ``step`` counts from 1."""

    learning_rate: float
    beta1: float
    beta2: float
    step: int
    eps: float = 1e-8

    def rates(self) -> tuple[float, float]:
        """(learning rate / bias correction of m, 1 / sqrt of the bias correction of v)."""
        return (
            self.learning_rate / (1 - self.beta1**self.step),
            (1 - self.beta2**self.step) ** -0.5,
        )


@contextmanager
def _threads(operations: int) -> Iterator[None]:
    """One thread for a small loop, as many as before otherwise."""
    before = get_num_threads()
    set_num_threads(1 if operations < _SERIAL else before)
    try:
        yield
    finally:
        set_num_threads(before)


# --------------------------------------------------------------------------- inputs


def _patterns(values: Tensor) -> np.ndarray:
    """Positive floats are ordered as their bits are when read as integers."""
    as_int = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[values.dtype]
    return values.view(as_int).numpy()


@njit(**_PARALLEL)
def _normalise_rows(x: np.ndarray, eps: float, z: np.ndarray, scale: np.ndarray) -> None:
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


def normalise_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each row less its mean, over its (unbiased) standard deviation + eps.

    x: (b, d) float32, contiguous. Returns z (b, d) and what each row was divided by, (b,).
    """
    z, scale = torch.empty_like(x), torch.empty(x.shape[0])
    with _threads(x.numel()):
        _normalise_rows(x.numpy(), eps, z.numpy(), scale.numpy())
    return z, scale


def normalise_rows_plain(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain form of :func:`normalise_rows`."""
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + eps), (std + eps)[:, 0]


@njit(**_LOOP)
def _to_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    """Round float32 bits (int32) to the nearest bfloat16 (int16), ties to even."""
    for i in range(bits.shape[0]):
        x = bits[i]
        out[i] = (x + 0x7FFF + ((x >> 16) & 1)) >> 16


@njit(**_PARALLEL)
def _centre(z: np.ndarray, b_dec: np.ndarray, out: np.ndarray) -> None:
    b, d = z.shape
    for r in prange(b):
        row = np.empty(d, np.float32)
        for i in range(d):
            row[i] = z[r, i] - b_dec[i]
        _to_bfloat16(row.view(np.int32), out[r])


def centre(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """``z - b_dec`` in the products' type, in one pass. z: (b, d) float32, b_dec: (d,)."""
    if dtype != torch.bfloat16:
        return centre_plain(z, b_dec, dtype)
    out = torch.empty_like(z, dtype=dtype)
    with _threads(z.numel()):
        _centre(z.numpy(), b_dec.numpy(), _patterns(out))
    return out


def centre_plain(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain form of :func:`centre`."""
    return (z - b_dec).to(dtype)


# --------------------------------------------------------------------------- exact batch top-k


@njit(**_PARALLEL)
def _count_from(patterns: np.ndarray, low: int, counts: np.ndarray) -> None:
    """counts[r] = how many of row r are >= low."""
    n = patterns.shape[1]
    for r in prange(patterns.shape[0]):
        row = patterns[r]
        total = 0
        for i in range(n):
            total += row[i] >= low
        counts[r] = total


@njit(**_PARALLEL)
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


@njit(**_LOOP)
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


@njit(**_LOOP)
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


@njit(**_LOOP)
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
    patterns = _patterns(pre)
    b, n = patterns.shape
    top = int(np.iinfo(patterns.dtype).max)
    counts = np.empty(b, np.int64)
    start = np.zeros(b + 1, np.int64)
    low = max(bracket, 1)
    with _threads(b * n):
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


# --------------------------------------------------------------------------- sparse decoding


@njit(**_PARALLEL)
def _residual(
    row_ptr: np.ndarray,
    cols: np.ndarray,
    acts: np.ndarray,
    z: np.ndarray,
    W_dec: np.ndarray,
    b_dec: np.ndarray,
    error: np.ndarray,
    square: np.ndarray,
    dots: np.ndarray,
) -> None:
    b, d = z.shape
    for block in prange((b + _ROWS - 1) // _ROWS):
        total = np.empty(d, np.float32)
        for t in range(block * _ROWS, min(b, (block + 1) * _ROWS)):
            for i in range(d):
                total[i] = z[t, i] - b_dec[i]
            p, end = row_ptr[t], row_ptr[t + 1]
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
            s = np.float32(0)
            for i in range(d):
                s += total[i] * total[i]
                error[t, i] = total[i]
            square[t] = s
            if dots.shape[0] > 0:
                for p in range(row_ptr[t], row_ptr[t + 1]):
                    w = W_dec[cols[p]]
                    s = np.float32(0)
                    for i in range(d):
                        s += total[i] * w[i]
                    dots[p] = s


def residual(
    codes: Codes, z: Tensor, W_dec: Tensor, b_dec: Tensor, with_dots: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    """What the dictionary leaves of its input, ``e = z - (acts @ W_dec + b_dec)``.

    z: (b, d) float32. Returns e (b, d), its squared norm (b,), and for each entry the product of
    e with its decoder row, (m,) in token-major order (empty unless asked for).
    """
    error = torch.empty_like(z)
    square = torch.empty(z.shape[0], dtype=torch.float32)
    dots = np.empty(codes.cols.shape[0] if with_dots else 0, np.float32)
    with _threads((codes.cols.shape[0] + z.shape[0]) * z.shape[1]):
        _residual(
            codes.row_ptr, codes.cols, codes.acts, z.numpy(), W_dec.numpy(), b_dec.numpy(),
            error.numpy(), square.numpy(), dots,
        )  # fmt: skip
    return error, square, dots


def residual_plain(
    codes: DenseCodes, z: Tensor, W_dec: Tensor, b_dec: Tensor, with_dots: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain form of :func:`residual`; the products are a (b, n) matrix, zero where not selected."""
    weights = W_dec.to(codes.acts.dtype)
    error = z - b_dec - (codes.acts @ weights).to(z.dtype)
    square = error.square().sum(-1)
    if not with_dots:
        return error, square, codes.acts[:0]
    dots = error.to(codes.acts.dtype) @ weights.T
    return error, square, torch.where(codes.acts > 0, dots, torch.zeros_like(dots))


# --------------------------------------------------------------------------- dead features


@njit(**_PARALLEL)
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
    with _threads(out.numel() * 8):
        _row_topk(_patterns(pre), features.numpy(), k, _patterns(out))
    return out


def row_topk_plain(pre: Tensor, features: Tensor, k: int) -> Tensor:
    """Plain form of :func:`row_topk`; a feature -1 is none, its column zero."""
    values = torch.where(features < 0, 0, pre[:, features].relu())
    return torch.where(top_mask(values, k), values, torch.zeros_like(values))


# --------------------------------------------------------------------------- the fused update


@njit(**_LOOP)
def _adam_row(
    w: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    rate: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    rate_, root_, eps_ = np.float32(rate), np.float32(root), np.float32(eps)
    new1, beta2_ = np.float32(1 - beta1), np.float32(beta2)
    new2, tiny, zero = np.float32(1 - beta2), np.float32(_TINY), np.float32(0)
    for i in range(w.shape[0]):
        a = m[i] + (g[i] - m[i]) * new1
        c = v[i] * beta2_ + new2 * g[i] * g[i]
        a = a if abs(a) > tiny else zero
        c = c if c > tiny else zero
        m[i] = a
        v[i] = c
        w[i] -= rate_ * a / (np.sqrt(c) * root_ + eps_)


@njit(**_PARALLEL)
def _update_rows(
    W_enc_T: np.ndarray,
    W_enc_low: np.ndarray,
    W_dec: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    col_ptr: np.ndarray,
    entries: np.ndarray,
    rows: np.ndarray,
    acts: np.ndarray,
    dots: np.ndarray,
    z: np.ndarray,
    error: np.ndarray,
    b_dec: np.ndarray,
    scale: float,
    extra: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    direction: np.ndarray,
    pull: np.ndarray,
    adam: tuple[float, float, float, float, float],
    unit: bool,
    partial: np.ndarray,
) -> None:
    n, d = W_dec.shape
    m_enc, v_enc, m_dec, v_dec = moments
    position, extra_dec, extra_enc, extra_pre = extra
    rate, root, beta1, beta2, eps = adam
    scale_ = np.float32(scale)
    for block in prange((n + _ROWS - 1) // _ROWS):
        g_dec = np.empty(d, np.float32)
        g_enc = np.empty(d, np.float32)
        part = partial[block]
        part[:] = 0
        for j in range(block * _ROWS, min(n, (block + 1) * _ROWS)):
            w_dec, w_enc = W_dec[j], W_enc_T[j]
            g_dec[:] = 0
            g_enc[:] = 0
            g_pre = np.float32(0)
            # Two entries at a time: half the traffic to the sums.
            q, end = col_ptr[j], col_ptr[j + 1]
            while q < end:
                p, t = entries[q], rows[q]
                a, c = scale_ * acts[p], scale_ * dots[p]
                e_t, z_t = error[t], z[t]
                g_pre += c
                if q + 1 < end:
                    p, t = entries[q + 1], rows[q + 1]
                    a2, c2 = scale_ * acts[p], scale_ * dots[p]
                    e_t2, z_t2 = error[t], z[t]
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
                c = pull[j]
                for i in range(d):
                    g_dec[i] += c * direction[j, i]
            for i in range(d):
                part[i] -= g_pre * w_enc[i]
            _adam_row(w_enc, m_enc[j], v_enc[j], g_enc, rate, root, beta1, beta2, eps)
            if W_enc_low.shape[0] > 0:
                _to_bfloat16(w_enc.view(np.int32), W_enc_low[j])
            along = np.float32(0)
            for i in range(d):
                along += g_dec[i] * w_dec[i]
            for i in range(d):
                g_dec[i] -= along * w_dec[i]
            _adam_row(w_dec, m_dec[j], v_dec[j], g_dec, rate, root, beta1, beta2, eps)
            if unit:
                s = np.float32(0)
                for i in range(d):
                    s += w_dec[i] * w_dec[i]
                s = np.float32(1) / np.sqrt(s)
                for i in range(d):
                    w_dec[i] *= s


def update_rows(
    W_enc_T: Tensor,
    W_enc_low: Tensor,
    W_dec: Tensor,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    codes: Codes,
    dots: np.ndarray,
    z: Tensor,
    error: Tensor,
    b_dec: Tensor,
    scale: float,
    extra: Extra,
    pull: Pull | None,
    adam: Adam,
    unit: bool = True,
) -> Tensor:
    """Gradient, Adam step and unit rows of every feature, in place, one row at a time.

    With ``c = scale`` (the derivative of the L2 loss is ``c * error``), activations ``a`` and
    products ``q`` of :func:`residual`::

        dL/dW_dec[j]    = c * sum_t a[t,j] error[t]            (+ extra, + pull)
        dL/dpre[t,j]    = c * q[t,j]
        dL/dW_enc[:, j] = sum_t dL/dpre[t,j] (z[t] - b_dec)     (+ extra)

    The component of the decoder's gradient along its row is removed before the step and the row
    is made a unit vector after it (if `unit`). No (n, d) gradient exists at any time.

    W_enc_low: the encoder in the products' type, renewed; W_enc_T itself if that is float32.
    moments: m and v of W_enc_T, then of W_dec. Returns the gradient that reaches b_dec through the
    encoder, ``-sum_j (sum_t dL/dpre[t,j]) W_enc[:, j]``, (d,).
    """
    n, d = W_dec.shape
    partial = np.empty(((n + _ROWS - 1) // _ROWS, d), np.float32)
    empty = np.empty((0, d), np.float32)
    low = empty.astype(np.int16) if W_enc_low is W_enc_T else W_enc_low.view(torch.int16).numpy()
    with _threads((n + codes.cols.shape[0]) * d):
        _update_rows(
            W_enc_T.numpy(), low, W_dec.numpy(), tuple(m.numpy() for m in moments),
            codes.col_ptr, codes.entries, codes.rows, codes.acts, dots,
            z.numpy(), error.numpy(), b_dec.numpy(), scale, tuple(x.numpy() for x in extra),
            empty if pull is None else pull.direction.numpy(),
            empty[:, 0] if pull is None else pull.scale.numpy(),
            (*adam.rates(), adam.beta1, adam.beta2, adam.eps),
            unit,
            partial,
        )  # fmt: skip
    return torch.from_numpy(partial.sum(0))


def adam_step(w: Tensor, m: Tensor, v: Tensor, g: Tensor, adam: Adam) -> None:
    """``torch.optim.Adam`` on one tensor, in place."""
    rate, root = adam.rates()
    m.lerp_(g, 1 - adam.beta1)
    v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    w.addcdiv_(m, (v.sqrt() * root).add_(adam.eps), value=-rate)


def update_rows_plain(
    W_enc_T: Tensor,
    W_enc_low: Tensor,
    W_dec: Tensor,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    codes: DenseCodes,
    dots: Tensor,
    z: Tensor,
    error: Tensor,
    b_dec: Tensor,
    scale: float,
    extra: Extra,
    pull: Pull | None,
    adam: Adam,
    unit: bool = True,
) -> Tensor:
    """Plain form of :func:`update_rows`; holds the (n, d) gradients."""
    m_enc, v_enc, m_dec, v_dec = moments
    dtype = codes.acts.dtype
    g_dec = scale * (codes.acts.T @ error.to(dtype)).to(W_dec.dtype)
    g_enc = scale * (dots.T @ z.to(dtype)).to(W_dec.dtype)
    g_pre = scale * dots.sum(0, dtype=W_dec.dtype)
    g_enc = g_enc - g_pre.unsqueeze(1) * b_dec
    if extra.W_dec.shape[0]:
        has = (extra.position >= 0).unsqueeze(1)
        at = extra.position.clamp(min=0).long()
        g_dec = g_dec + torch.where(has, extra.W_dec[at], 0)
        g_enc = g_enc + torch.where(has, extra.W_enc_T[at], 0)
        g_pre = g_pre + torch.where(has[:, 0], extra.pre[at], 0)
    if pull is not None:
        g_dec = g_dec + pull.scale.unsqueeze(1) * pull.direction
    g_b = -(g_pre @ W_enc_T)
    g_dec = g_dec - (g_dec * W_dec).sum(1, keepdim=True) * W_dec
    adam_step(W_enc_T, m_enc, v_enc, g_enc, adam)
    W_enc_low.copy_(W_enc_T)
    adam_step(W_dec, m_dec, v_dec, g_dec, adam)
    if unit:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return g_b


def fired(codes: Codes) -> Tensor:
    """Which features have a selected activation, (n,) bool."""
    return torch.from_numpy(np.diff(codes.col_ptr) > 0)


def fired_plain(codes: DenseCodes) -> Tensor:
    """Plain form of :func:`fired`."""
    return (codes.acts > 0).any(0)


# --------------------------------------------------------------------------- JumpReLU


@njit(**_PARALLEL)
def _count_above(patterns: np.ndarray, low: np.ndarray, counts: np.ndarray) -> None:
    """counts[r] = how many entries of row r reach the bound of their column."""
    for r in prange(patterns.shape[0]):
        total = 0
        for i in range(patterns.shape[1]):
            total += patterns[r, i] >= low[i]
        counts[r] = total


@njit(**_PARALLEL)
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


def _least_above(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The least pattern of a type above each value, which must not be negative."""
    bits = _patterns(values)
    # A bfloat16 is the upper half of a float32.
    return (bits >> 16 if dtype == torch.bfloat16 else bits) + 1


def above_threshold(pre: Tensor, threshold: Tensor) -> Codes:
    """The pre-activations above their feature's threshold (JumpReLU).

    pre: (b, n) bfloat16 or float32, contiguous. threshold: (n,) float32, at least 0.
    """
    patterns, low = _patterns(pre), _least_above(threshold, pre.dtype)
    counts = np.empty(len(patterns), np.int64)
    with _threads(patterns.size):
        _count_above(patterns, low, counts)
        start = np.concatenate([[0], np.cumsum(counts)])
        cols = np.empty(start[-1], np.int32)
        found = np.empty(start[-1], patterns.dtype)
        _gather_above(patterns, low, start, cols, found)
    return _codes(start, cols, found, pre.dtype, patterns.shape[1])


def above_threshold_plain(pre: Tensor, threshold: Tensor) -> DenseCodes:
    """Plain form of :func:`above_threshold`."""
    return DenseCodes(torch.where(pre > threshold, pre, 0))


@njit(**_PARALLEL)
def _between(
    patterns: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    error: np.ndarray,
    W_dec: np.ndarray,
    dots: np.ndarray,
    counts: np.ndarray,
) -> None:
    b, n = patterns.shape
    d = error.shape[1]
    for block in prange((n + _ROWS - 1) // _ROWS):
        for t in range(b):
            for j in range(block * _ROWS, min(n, (block + 1) * _ROWS)):
                if low[j] <= patterns[t, j] < high[j]:
                    s = np.float32(0)
                    for i in range(d):
                        s += error[t, i] * W_dec[j, i]
                    dots[j] += s
                    counts[j] += 1


def near_threshold(
    pre: Tensor, threshold: Tensor, reach: float, error: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """What a threshold's gradient is made of, from entries within `reach` of it.

    pre: (b, n). threshold: (n,), at least `reach`. error: (b, d). W_dec: (n, d). Returns for each
    feature the sum of error · row over the entries with threshold - reach < pre <=
    threshold + reach, and their number, both (n,) float32.
    """
    dots, counts = torch.zeros_like(threshold), torch.zeros_like(threshold)
    with _threads(pre.numel()):
        _between(
            _patterns(pre), _least_above(threshold - reach, pre.dtype),
            _least_above(threshold + reach, pre.dtype), error.numpy(), W_dec.numpy(),
            dots.numpy(), counts.numpy(),
        )  # fmt: skip
    return dots, counts


def near_threshold_plain(
    pre: Tensor, threshold: Tensor, reach: float, error: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain form of :func:`near_threshold`."""
    near = (pre > threshold - reach) & (pre <= threshold + reach)
    dots = (error.to(pre.dtype) @ W_dec.to(pre.dtype).T) * near
    return dots.sum(0, dtype=threshold.dtype), near.sum(0).to(threshold.dtype)


@dataclass(frozen=True)
class Kernels:
    """The loops of a training step in one of their two forms."""

    normalise_rows: Callable[..., tuple[Tensor, Tensor]]
    centre: Callable[..., Tensor]
    batch_topk: Callable[..., tuple[Any, int]]
    residual: Callable[..., tuple[Tensor, Tensor, Any]]
    fired: Callable[..., Tensor]
    row_topk: Callable[..., Tensor]
    update_rows: Callable[..., Tensor]
    above_threshold: Callable[..., Any]
    near_threshold: Callable[..., tuple[Tensor, Tensor]]


COMPILED = Kernels(
    normalise_rows, centre, batch_topk, residual, fired, row_topk, update_rows,
    above_threshold, near_threshold,
)  # fmt: skip
PLAIN = Kernels(
    normalise_rows_plain, centre_plain, batch_topk_plain, residual_plain, fired_plain,
    row_topk_plain, update_rows_plain, above_threshold_plain, near_threshold_plain,
)  # fmt: skip
