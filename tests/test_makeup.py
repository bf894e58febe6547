"""What the residual is made of, on one with a massive constant dimension."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from metasae_lib import Run
from metasae_lib.measure import makeup, residual_makeup
from metasae_lib.show import makeup_sentence

D, KEPT = 24, 127  # of the profile tiny: rows of 128 without position 0


def massive() -> torch.Tensor:
    """Four rows of tokens: dimension 5 is large and nearly constant, dimension 7 varies much."""
    x = torch.randn(4 * KEPT, D, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 100 + x[:, 5]
    x[:, 7] *= 12
    return x


class Fake:
    def __init__(self, run: Run, role: str) -> None:
        assert role == "train"

    def chunk(self, index: int) -> torch.Tensor:
        return massive()


@pytest.fixture(autouse=True)
def residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makeup, "Residuals", Fake)


def started(run: Run, start: str) -> Run:
    training = run.profile.training.model_copy(update={"start": start})
    run.profile = run.profile.model_copy(update={"training": training})
    return run


def test_shares_by_hand(run: Run) -> None:
    x = massive().double().numpy()
    z = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-5)
    square, variance = (z**2).mean(axis=0), z.var(axis=0)
    found, _ = residual_makeup(run)
    assert found.dimension[0] == 5 and len(found) == 11 and found.dimension.iloc[-1] == -1
    assert found.share[0] == pytest.approx(square[5] / square.sum(), rel=1e-4)
    assert found.varying[0] == pytest.approx(variance[5] / variance.sum(), rel=1e-4)
    assert found.trained.tolist() == pytest.approx(found.share.tolist())  # the paper's start
    assert found[["share", "varying", "trained"]].sum().tolist() == pytest.approx([1, 1, 1])
    assert found.mean_share[0] == pytest.approx(
        (z.mean(axis=0) ** 2).sum() / square.sum(), rel=1e-4
    )


def test_the_sentence_names_the_next_start(run: Run) -> None:
    """Without the mean one dimension still varies too much; scaled, none does."""
    said = {
        start: makeup_sentence(run, residual_makeup(started(run, start))[0])
        for start in ("zeros", "mean", "standard")
    }
    assert "dominated by 3 dimensions" in said["zeros"] and "to `mean`" in said["zeros"]
    assert "dominated by 3 dimensions" in said["mean"] and "to `standard`" in said["mean"]
    assert "dominated" not in said["standard"]


def test_norms_by_position(run: Run) -> None:
    _, found = residual_makeup(run)
    assert found.position.tolist() == list(range(1, 128))
    expected = np.linalg.norm(massive().numpy(), axis=1).reshape(4, KEPT).mean(axis=0)
    assert found.norm.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert isinstance(found, pd.DataFrame)
