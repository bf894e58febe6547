"""Eq. 2-3 by hand, by autograd, and the hand-written gradient."""

from __future__ import annotations

import math

import pytest
import torch

from metasae_lib.errors import DictionaryError
from metasae_lib.penalty import decomposability_penalty, penalty_pull


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
    with pytest.raises(DictionaryError, match="above 0"):
        decomposability_penalty(torch.zeros(3, 2), torch.zeros(3, 2), 0.0)
