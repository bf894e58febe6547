"""Kernels before the encoder's product: normalised rows, centred and rounded."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from metasae_lib.train.kernels.common import LOOP, PARALLEL, bit_patterns, threads_for


@njit(**PARALLEL)
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
    with threads_for(x.numel()):
        _normalise_rows(x.numpy(), eps, z.numpy(), scale.numpy())
    return z, scale


def normalise_rows_plain(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain form of :func:`normalise_rows`."""
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + eps), (std + eps)[:, 0]


@njit(**LOOP)
def to_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    """Round float32 bits (int32) to the nearest bfloat16 (int16), ties to even."""
    for i in range(bits.shape[0]):
        x = bits[i]
        out[i] = (x + 0x7FFF + ((x >> 16) & 1)) >> 16


@njit(**PARALLEL)
def _centre(z: np.ndarray, b_dec: np.ndarray, out: np.ndarray) -> None:
    b, d = z.shape
    for r in prange(b):
        row = np.empty(d, np.float32)
        for i in range(d):
            row[i] = z[r, i] - b_dec[i]
        to_bfloat16(row.view(np.int32), out[r])


def centre(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """``z - b_dec`` in the products' type, in one pass. z: (b, d) float32, b_dec: (d,)."""
    if dtype != torch.bfloat16:
        return centre_plain(z, b_dec, dtype)
    out = torch.empty_like(z, dtype=dtype)
    with threads_for(z.numel()):
        _centre(z.numpy(), b_dec.numpy(), bit_patterns(out))
    return out


def centre_plain(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain form of :func:`centre`."""
    return (z - b_dec).to(dtype)
