"""Gradients of the dictionary's rows and Adam's step on them, fused."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.train.kernels.common import (
    LOOP,
    PARALLEL,
    ROWS,
    TINY,
    Adam,
    Codes,
    DenseCodes,
    Extra,
    Pull,
    bit_patterns,
    threads_for,
)
from metasae_lib.train.kernels.inputs import to_bfloat16
from metasae_lib.train.kernels.select import least_above


@njit(**LOOP)
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
    for block in prange((n + ROWS - 1) // ROWS):
        g_dec = np.empty(d, np.float32)
        g_enc = np.empty(d, np.float32)
        part = partial[block]
        part[:] = 0
        for j in range(block * ROWS, min(n, (block + 1) * ROWS)):
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
                to_bfloat16(w_enc.view(np.int32), W_enc_low[j])
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
    partial = np.empty(((n + ROWS - 1) // ROWS, d), np.float32)
    empty = np.empty((0, d), np.float32)
    low = empty.astype(np.int16) if W_enc_low is W_enc_T else W_enc_low.view(torch.int16).numpy()
    with threads_for((n + codes.cols.shape[0]) * d):
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


@njit(**PARALLEL)
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
    for block in prange((n + ROWS - 1) // ROWS):
        for t in range(b):
            for j in range(block * ROWS, min(n, (block + 1) * ROWS)):
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
    with threads_for(pre.numel()):
        _between(
            bit_patterns(pre), least_above(threshold - reach, pre.dtype),
            least_above(threshold + reach, pre.dtype), error.numpy(), W_dec.numpy(),
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
