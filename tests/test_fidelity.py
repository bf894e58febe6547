from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metasae_lib import Run
from metasae_lib.measure import fidelity
from metasae_lib.measure.fidelity import Moments, Reconstruction, reconstruct, replacement
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK, normalise


def made(threshold: float | None = 0.4) -> tuple[BatchTopK, Tensor]:
    sae = BatchTopK(12, 40, 5, seed=1)
    sae.b_dec.copy_(torch.randn(12, generator=torch.Generator().manual_seed(2)) / 5)
    if threshold is not None:
        sae.threshold = torch.linspace(threshold, 2 * threshold, 40)
        sae.threshold[3] = torch.inf
    return sae, torch.randn(30, 12, generator=torch.Generator().manual_seed(0))


def over(d: int) -> tuple[Reconstruction, Moments]:
    moments = Moments(d)
    return Reconstruction(moments), moments


def test_l2_fvu_and_l0_of_a_hand_worked_example() -> None:
    sums, moments = over(2)
    moments.add(torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
    sums.add(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 3)
    sums.add(torch.tensor([[4.0, 2.0]]), torch.tensor([[4.0, 0.0]]), 2)
    # Errors 1 and 4 over 2 tokens of 2 dimensions. Means (2, 2): variance 4 + 4 + 0 + 0.
    assert sums.l2 == 5 / 4
    assert sums.fvu == 5 / 8
    assert sums.l0 == 2.5


def test_fvu_is_one_for_the_mean_and_zero_for_a_copy() -> None:
    z = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).double() + 3
    for z_hat, expected in ((z.mean(0).expand_as(z), 1.0), (z, 0.0)):
        sums, moments = over(7)
        moments.add(z)
        for part, part_hat in zip(z.split(90), z_hat.split(90), strict=True):
            sums.add(part, part_hat, 0)
        assert sums.fvu == pytest.approx(expected, abs=1e-12)
    sums, moments = over(7)
    moments.add(torch.ones(4, 7))
    sums.add(torch.ones(4, 7), torch.zeros(4, 7), 0)
    with pytest.raises(MeasureError, match="tokens that differ"):
        _ = sums.fvu


def test_sparse_reconstruction_equals_the_dense_dictionary() -> None:
    sae, z = made()
    acts = sae.encode_threshold(z)
    z_hat, n_active = reconstruct(sae, z, "threshold")
    torch.testing.assert_close(z_hat, sae.decode(acts))
    assert n_active == int((acts > 0).sum()) and not acts[:, 3].any()
    acts = sae.encode(z)
    z_hat, n_active = reconstruct(sae, z, "batch")
    torch.testing.assert_close(z_hat, sae.decode(acts))
    assert n_active == int((acts > 0).sum()) == 150
    with pytest.raises(MeasureError, match="calibrate"):
        reconstruct(made(None)[0], z, "threshold")


def test_replacement_works_per_token_and_spares_position_0() -> None:
    sae, _ = made()
    x = 50 * torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(4)) + 9
    x[:, 0] *= 1000
    out = replacement(sae, "threshold", first=1)(x)
    assert torch.equal(out[:, 0], x[:, 0])
    for row in range(3):
        for position in range(1, 6):
            token = x[row, position]
            z = (token - token.mean()) / (token.std() + 1e-5)
            z_hat = sae.decode(sae.encode_threshold(z[None]))[0]
            expected = z_hat * (token.std() + 1e-5) + token.mean()
            torch.testing.assert_close(out[row, position], expected, rtol=1e-4, atol=1e-3)
    assert replacement(sae, "batch")(x.bfloat16()).dtype == torch.bfloat16


class FakeSubject:
    """CE is a known function of the residuals that reach it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def residuals(self, ids: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(ids[:, 0]).long()]

    def loss(self, ids: np.ndarray, replace: Any, residuals: Tensor) -> Tensor:
        assert torch.equal(residuals, self.residuals(ids))
        return replace(residuals).square().mean(-1)[:, :-1]


def test_ce_overhead_is_paired_over_rows_and_kept_positions(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, _ = made()
    x = torch.randn(20, 5, 12, generator=torch.Generator().manual_seed(0)) * 3
    rows = np.repeat(np.arange(20, dtype=np.int32)[:, None], 5, axis=1)
    tokens = SimpleNamespace(rows=lambda role: rows)
    monkeypatch.setattr(fidelity, "load_tokens", lambda run: tokens)
    arm = SimpleNamespace(spec=ArmSpec("solo", 0), sae=sae, folder=Path("arm"))
    monkeypatch.setattr(fidelity, "product_dtype", lambda run: torch.float32)
    ours, by_row = fidelity._entropies(run, {"solo": arm}, FakeSubject(x))["solo"]  # type: ignore
    n = run.profile.evaluation.ce_rows
    assert ours["ce_rows"] == n and ours["ce_tokens"] == n * 3  # positions 1..3 of 5
    z, mean, std = normalise(x[:n, 1:4].flatten(0, 1))
    z_hat = sae.decode(sae.encode_threshold(z))
    back = (z_hat * (std + 1e-5) + mean).view(n, 3, 12)
    rise = back.square().mean(-1).mean(1) - x[:n, 1:4].square().mean(-1).mean(1)
    assert ours["ce_overhead_nats"] == pytest.approx(float(rise.mean()), rel=1e-4)
    assert by_row == pytest.approx(rise.tolist(), rel=1e-3, abs=1e-4)
    assert ours["ce_overhead_se"] == pytest.approx(float(rise.std()) / n**0.5, rel=1e-4)
    assert ours["ce"] - ours["ce_baseline"] == pytest.approx(ours["ce_overhead_nats"], rel=1e-6)
    n = min(n, run.profile.model.batch_rows)  # training mode: one batch
    z, mean, std = normalise(x[:n, 1:].flatten(0, 1))  # the last position competes, unscored
    back = (sae.decode(sae.encode(z)) * (std + 1e-5) + mean).view(n, 4, 12)[:, :3]
    rise = back.square().mean(-1) - x[:n, 1:4].square().mean(-1)
    assert ours["ce_overhead_batch_nats"] == pytest.approx(float(rise.mean()), rel=1e-4)
    share = 100 * ours["ce_overhead_nats"] / ours["ce_baseline"]
    assert ours["ce_overhead_pct"] == pytest.approx(share)
