"""The sparse decoding of a batch, and what it leaves of the inputs."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.train.kernels.common import PARALLEL, ROWS, Codes, DenseCodes, threads_for


@njit(**PARALLEL)
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
    for block in prange((b + ROWS - 1) // ROWS):
        total = np.empty(d, np.float32)
        for t in range(block * ROWS, min(b, (block + 1) * ROWS)):
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
    with threads_for((codes.cols.shape[0] + z.shape[0]) * z.shape[1]):
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
