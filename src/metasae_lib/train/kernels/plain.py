"""The kernels in plain torch, with dense matrices: what a GPU runs, and the compiled ones' oracle.

Each stands for the function of the same name in :mod:`metasae_lib.train.kernels.compiled`.
"""

from __future__ import annotations

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
    positive = pre.relu()
    k = min(k, pre.numel())
    cut = positive.flatten().topk(k, sorted=False).values.min()
    above, tied = positive > cut, positive == cut
    room = k - above.sum()
    upto = tied.sum(1).cumsum(0)  # tied entries to the end of each row
    last = (upto < room).sum().clamp(max=len(pre) - 1).view(1)  # the row in which there is no more
    rows = torch.arange(len(pre), device=pre.device)
    keep = above | (tied & (rows < last).unsqueeze(1))
    ends = tied.index_select(0, last)
    before = upto.index_select(0, last) - ends.sum(1)
    some = ends & (ends.cumsum(1) + before.unsqueeze(1) <= room)
    keep.index_copy_(0, last, keep.index_select(0, last) | some)
    return DenseCodes(torch.where(keep, positive, 0)), bracket


def above_threshold(pre: Tensor, threshold: Tensor) -> DenseCodes:
    return DenseCodes(torch.where(pre > threshold, pre, 0))


def fired(codes: DenseCodes) -> Tensor:
    return (codes.acts > 0).any(0)


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
    return error, square, torch.where(acts > 0, dots, 0)


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
    W_enc_T, W_dec, m_enc, v_enc, m_dec, v_dec = weights
    codes, dots, z, error, ends, b_dec, scale = batch
    dtype = codes.acts.dtype
    products = torch.empty_like(W_dec, dtype=dtype)
    for part, felt in zip(groups(ends), error, strict=True):
        torch.mm(codes.acts[:, part].T, felt.to(dtype), out=products[part])
    g_dec = scale * products.to(W_dec.dtype)
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
    low.copy_(W_enc_T)
    adam_step(W_dec, m_dec, v_dec, g_dec, adam)
    if unit:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return g_b


def near_threshold(
    pre: Tensor, threshold: Tensor, reach: float, error: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor]:
    near = (pre > threshold - reach) & (pre <= threshold + reach)
    dots = (error.to(pre.dtype) @ W_dec.to(pre.dtype).T) * near
    return dots.sum(0, dtype=threshold.dtype), near.sum(0).to(threshold.dtype)
