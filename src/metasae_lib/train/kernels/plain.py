"""The kernels in plain torch, with dense matrices: what a GPU runs, and the compiled ones' oracle.

Each stands for the function of the same name in :mod:`metasae_lib.train.kernels.compiled`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metasae_lib.train.kernels.common import (
    Adam,
    Batch,
    DenseCodes,
    Extra,
    Pull,
    Rows,
    adam_step,
    groups,
)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that goes over large matrices element by element; on a GPU in as few passes as can
    be (torch.compile, where there is the C compiler that it needs)."""

    @cache  # when it is first asked for: importing the compiler takes seconds
    def compiled() -> Callable[..., Any]:
        compilers = os.environ.get("CC", "cc"), "gcc", "clang"
        there = any(map(shutil.which, compilers))
        return torch.compile(function, dynamic=False) if there else function

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *others)

    return run


def normalise_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + eps), (std + eps)[:, 0]


def centre(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    return (z - b_dec).to(dtype)


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


def batch_topk(pre: Tensor, k: int, bracket: int = 0) -> tuple[DenseCodes, int]:
    """The bracket is not used. Nothing waits for the host, and no sum runs over all b n entries: of
    the entries equal to the last value kept, rows are counted whole and one row entry by entry."""
    k = min(k, pre.numel())
    cut = pre.flatten().topk(k, sorted=False).values.min().clamp(min=0)
    above, tied = _count(pre, cut)
    room, upto = k - above, tied.cumsum(0)  # upto: tied entries to the end of each row
    last = (upto < room).sum().clamp(max=len(pre) - 1).view(1)  # the row in which there is no more
    ends = pre.index_select(0, last) == cut
    before = upto.index_select(0, last) - ends.sum(1)
    return DenseCodes(_kept(pre, cut, last, ends.cumsum(1) + before.unsqueeze(1) <= room)), bracket


@fused
def _count(pre: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Entries above the cut, and of each row those at it."""
    return (pre > cut).sum(), (pre == cut).sum(1)


@fused
def _kept(pre: Tensor, cut: Tensor, last: Tensor, some: Tensor) -> Tensor:
    """What is above the cut, or at it in a row before `last`, or there where `some` has it."""
    rows = torch.arange(len(pre), device=pre.device).unsqueeze(1)
    tied = (pre == cut) & ((rows < last) | ((rows == last) & some))
    return torch.where((pre > cut) | tied, pre, 0)


def above_threshold(pre: Tensor, threshold: Tensor) -> DenseCodes:
    return DenseCodes(torch.where(pre > threshold, pre, 0))


def fired(codes: DenseCodes) -> Tensor:
    return _any(codes.acts)


@fused
def _any(acts: Tensor) -> Tensor:
    return (acts > 0).any(0)


def row_topk(pre: Tensor, features: Tensor, k: int) -> Tensor:
    """A feature -1 is none, its column zero."""
    values = torch.where(features < 0, 0, pre[:, features].relu())
    return torch.where(top_mask(values, k), values, 0)


def missed(e_hat: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    miss = e_hat.to(error.dtype) - error
    return miss.to(e_hat.dtype), miss.square().mean()


def where_kept(g: Tensor, acts: Tensor) -> Tensor:
    g.mul_(acts.sign())
    return g.sum(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)


def residual(
    codes: DenseCodes, z: Tensor, W_dec: Tensor, b_dec: Tensor, ends: np.ndarray, with_dots: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The products are a (b, n) matrix, zero where not selected."""
    acts, weights, parts = codes.acts, W_dec.to(codes.acts.dtype), groups(ends)
    error, left = z.new_empty(len(parts), *z.shape), z - b_dec
    for g, part in enumerate(parts):
        left = torch.sub(left, (acts[:, part] @ weights[part]).to(z.dtype), out=error[g])
    square = left.square().sum(-1)
    for g in range(len(parts) - 1, 0, -1):
        error[g - 1] += error[g]
    if not with_dots:
        return error, square, acts[:0]
    dots = torch.empty_like(acts)
    for part, felt in zip(parts, error, strict=True):
        torch.mm(felt.to(acts.dtype), weights[part].T, out=dots[:, part])
    return error, square, _where_active(acts, dots)


@fused
def _where_active(acts: Tensor, dots: Tensor) -> Tensor:
    return torch.where(acts > 0, dots, 0)


def update_rows(
    weights: Rows,
    low: Tensor,
    batch: Batch,
    extra: Extra,
    pull: Pull | None,
    adam: Adam,
    unit: bool = True,
) -> Tensor:
    """Holds the (n, d) gradients."""
    W_enc_T, W_dec = weights[:2]
    codes, dots, z, error, ends, b_dec, scale = batch
    parts = [
        _product(codes.acts[:, part].T, felt.to(codes.acts.dtype), W_dec.dtype)
        for part, felt in zip(groups(ends), error, strict=True)
    ]
    g_dec = parts[0] if len(parts) == 1 else torch.cat(parts)
    g_enc = _product(dots.T, z.to(dots.dtype), W_dec.dtype)
    g_pre = scale * dots.sum(0, dtype=W_dec.dtype)
    g_b = -(g_pre @ W_enc_T)
    if len(extra.features):  # of centred inputs, and multiplied by what is still to come here
        at = extra.features.clamp(min=0)
        g_b -= extra.pre @ W_enc_T[at]
        for g, more in (g_dec, extra.W_dec), (g_enc, extra.W_enc_T):
            g.index_add_(0, at, more, alpha=1 / scale)
    _move_rows(*weights, low, g_enc, g_dec, g_pre, b_dec, pull, scale, adam, unit)
    return g_b


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in another type than that of its factors; a GPU does not round in between."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


@fused
def _move_rows(
    W_enc_T: Tensor, W_dec: Tensor, m_enc: Tensor, v_enc: Tensor, m_dec: Tensor, v_dec: Tensor,
    low: Tensor, g_enc: Tensor, g_dec: Tensor, g_pre: Tensor, b_dec: Tensor,
    pull: Pull | None, scale: float, adam: Adam, unit: bool,
) -> None:  # fmt: skip
    """What is left of a step once its products are there: of W_enc and W_dec only rows meet."""
    g_enc = g_enc * scale - g_pre.unsqueeze(1) * b_dec
    g_dec = g_dec * scale
    if pull is not None:
        g_dec = g_dec + pull.scale.unsqueeze(1) * pull.direction
    g_dec = g_dec - (g_dec * W_dec).sum(1, keepdim=True) * W_dec
    adam_step(W_enc_T, m_enc, v_enc, g_enc, adam)
    low.copy_(W_enc_T)
    adam_step(W_dec, m_dec, v_dec, g_dec, adam)
    if unit:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))


def near_threshold(
    pre: Tensor, threshold: Tensor, reach: float, error: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor]:
    near = (pre > threshold - reach) & (pre <= threshold + reach)
    dots = (error.to(pre.dtype) @ W_dec.to(pre.dtype).T) * near
    return dots.sum(0, dtype=threshold.dtype), near.sum(0).to(threshold.dtype)
