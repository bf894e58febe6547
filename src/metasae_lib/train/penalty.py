"""The decomposability penalty (Eq. 2-3), and the competing one of OrtSAE."""

from __future__ import annotations

import torch
from torch import Tensor

from metasae_lib.study import DictionaryError


def decomposability(squared_error: Tensor, sigma_sq: float) -> Tensor:
    """p_i = exp(-|W_i - What_i|² / σ²) of each decoder row (Eq. 2).

    squared_error: (n,) squared distance of each row from its reconstruction. Returns (n,).
    """
    return torch.exp(squared_error / -sigma_sq)


def decomposability_penalty(W_dec: Tensor, W_hat: Tensor, sigma_sq: float) -> Tensor:
    """How easily the meta dictionary rebuilds the decoder rows: mean_i p_i (Eq. 2-3).

    W_dec: (n, d) decoder rows. W_hat: (n, d) their reconstruction by the meta dictionary, a
    constant: the gradient reaches W_dec only. sigma_sq: bandwidth σ² > 0.
    Returns a scalar in [0, 1]; Eq. 3 weighs it by λ₂.
    """
    if W_dec.shape != W_hat.shape or W_dec.ndim != 2 or len(W_dec) == 0:
        raise DictionaryError(
            f"W_dec is {tuple(W_dec.shape)} and its reconstruction {tuple(W_hat.shape)}: "
            "give both the same shape (n, d)"
        )
    if not sigma_sq > 0:
        raise DictionaryError(f"sigma_sq is {sigma_sq}: give a number above 0")
    return decomposability((W_dec - W_hat.detach()).square().sum(-1), sigma_sq).mean()


def penalty_pull(squared_error: Tensor, lambda2: float, sigma_sq: float) -> Tensor:
    """The factor c_i in dPenalty/dW_i = c_i (W_i - What_i), written by hand.

    c_i = λ₂/n · p_i · (-2/σ²): each row is pushed away from its reconstruction.
    squared_error: (n,). Returns (n,).
    """
    n = squared_error.shape[0]
    return decomposability(squared_error, sigma_sq) * (-2 * lambda2 / (n * sigma_sq))


def orthogonality(
    W_dec: Tensor, chunk: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """OrtSAE's penalty (Korznikov et al. 2025) and its gradient, written by hand.

    The rows are dealt into random chunks, so that the cost grows with n · chunk, not n². With
    c_i the largest cosine of row i to another row of its chunk, the penalty is mean_i c_i².
    For unit rows, and but for a component along the row itself (which training removes),
    ``d/dW_i = 2/n (c_i W_j(i) + sum of c_l W_l over the rows l whose nearest is i)``.

    W_dec: (n, d) unit rows. generator: of the chunks; one chunk needs none. Returns the penalty, a
    scalar in [0, 1], and the gradient (n, d).
    """
    n = W_dec.shape[0]
    if chunk < 2:
        raise DictionaryError(f"a chunk of {chunk} rows has no pairs: give at least 2")
    order = torch.arange(n) if chunk >= n else torch.randperm(n, generator=generator)
    penalty, gradient = W_dec.new_zeros(()), torch.empty_like(W_dec)
    for rows in order.to(W_dec.device).split(chunk):
        W = W_dec[rows]
        cosines = W @ W.T
        cosines.fill_diagonal_(0)
        nearest = cosines.abs().argmax(1)
        value = cosines.gather(1, nearest[:, None])
        penalty += value.square().sum() / n
        # Sorted and not scattered: the order of addition is fixed on every device.
        pulls = 2 / n * value
        counts = torch.zeros_like(nearest).scatter_add_(0, nearest, torch.ones_like(nearest))
        sorted_pulls = (pulls * W)[nearest.argsort(stable=True)]
        back = torch.segment_reduce(sorted_pulls, "sum", lengths=counts, unsafe=True)
        gradient[rows] = pulls * W[nearest] + back
    return penalty, gradient
