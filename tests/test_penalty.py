"""Eq. 2-3 by hand, by autograd, and the hand-written gradient."""

from __future__ import annotations

import math

import pytest
import torch

from metasae_lib.study.errors import DictionaryError
from metasae_lib.train.penalty import decomposability_penalty, orthogonality, penalty_pull


def test_by_hand() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    W_hat = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    value = decomposability_penalty(W, W_hat, 0.5)
    assert value.item() == pytest.approx((1 + math.exp(-2)) / 2)


def test_gradient_reaches_W_dec_only() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    W_hat = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    decomposability_penalty(W, W_hat, 2.0).backward()
    assert W.grad is not None and W_hat.grad is None
    assert torch.autograd.gradcheck(lambda w: decomposability_penalty(w, W_hat, 2.0), (W,))


@pytest.mark.parametrize("sigma_sq", [0.3, 1.0, 3.0])
def test_hand_written_gradient(sigma_sq: float) -> None:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    W_hat = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    (0.3 * decomposability_penalty(W, W_hat, sigma_sq)).backward()
    difference = (W - W_hat).detach()
    mine = penalty_pull(difference.square().sum(1), 0.3, sigma_sq)[:, None] * difference
    torch.testing.assert_close(mine, W.grad, rtol=1e-12, atol=0)


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(DictionaryError, match="same shape"):
        decomposability_penalty(torch.zeros(3, 2), torch.zeros(2, 2), 1.0)
    for shape in ((3,), (1, 3, 2), (0, 2)):
        with pytest.raises(DictionaryError, match=r"same shape \(n, d\)"):
            decomposability_penalty(torch.zeros(shape), torch.zeros(shape), 1.0)
    with pytest.raises(DictionaryError, match="above 0"):
        decomposability_penalty(torch.zeros(3, 2), torch.zeros(3, 2), 0.0)


def test_orthogonality_by_hand() -> None:
    """Rows at 0°, 60° and 90°: largest squared cosines 1/4, 3/4, 3/4."""
    W = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2], [0.0, 1.0]])
    assert orthogonality(W, 8)[0].item() == pytest.approx((1 / 4 + 3 / 4 + 3 / 4) / 3)
    with pytest.raises(DictionaryError, match="at least 2"):
        orthogonality(W, 1)


@pytest.mark.parametrize("chunk", [5, 20])
def test_orthogonality_gradient(chunk: int) -> None:
    """Autograd through the cosines of every pair, in float64, with the same chunks."""
    W = torch.randn(17, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    W = (W / W.norm(dim=1, keepdim=True)).requires_grad_()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(7))
    groups = order.split(chunk) if chunk < 17 else [torch.arange(17)]
    total = torch.zeros((), dtype=torch.float64)
    for rows in groups:
        for i in rows.tolist():
            others = [torch.cosine_similarity(W[i], W[j], dim=0) for j in rows.tolist() if j != i]
            if others:
                total = total + torch.stack(others).square().max() / 17
    total.backward()
    assert W.grad is not None
    value, gradient = orthogonality(W.detach(), chunk, torch.Generator().manual_seed(7))
    assert value.item() == pytest.approx(total.item(), rel=1e-12)
    along = (gradient * W.detach()).sum(1, keepdim=True) * W.detach()
    torch.testing.assert_close(gradient - along, W.grad, rtol=1e-9, atol=1e-12)
