from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lib.measure.passes import pre_activations, training_batches
from metasae_lib.measure.thresholds import RULES, Calibrator, OwnThresholds, calibrate
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK


def made(
    seed: int, n_batches: int = 6, b: int = 40, n: int = 30, drift: float = 0.1
) -> list[Tensor]:
    """Batches whose cut-offs differ; feature 0 never positive, feature 1 rarely selected."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(n_batches):
        pre = torch.randn(b, n, generator=generator) * (1 + drift * i)
        pre[:, 0] = -pre[:, 0].abs()
        pre[:, 1] *= 0.6
        batches.append(pre)
    return batches


def selections(batches: list[Tensor], k: int) -> tuple[np.ndarray, list[float]]:
    """Selected by a full sort of each batch: counts by feature and cut-offs."""
    counts, cutoffs = np.zeros(batches[0].shape[1], int), []
    for pre in batches:
        flat = pre.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: k * len(pre)]
        order = [i for i in order if flat[i] > 0]
        for i in order:
            counts[i % pre.shape[1]] += 1
        cutoffs.append(flat[order[-1]])
    return counts, cutoffs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0, 0.6))
def test_rate_fires_exactly_as_often_as_selected(seed: int, k: int, drift: float) -> None:
    batches = made(seed, drift=drift)
    counts, cutoffs = selections(batches, k)
    theta = calibrate(batches, k, "rate")
    everything = torch.cat(batches)
    assert ((everything > theta).sum(0).numpy() == counts).all()
    assert torch.isinf(theta).numpy().tolist() == (counts == 0).tolist()
    assert theta.dtype == torch.float32
    alive = theta[torch.isfinite(theta)]
    assert (alive <= max(cutoffs)).all()
    assert (alive >= np.nextafter(np.float32(min(cutoffs)), np.float32(0))).all()


def test_rate_lies_half_way_between_neighbours_of_a_full_sort() -> None:
    batches = made(3, drift=0.3)
    counts, cutoffs = selections(batches, 4)
    theta = calibrate(batches, 4, "rate")
    everything = torch.cat(batches).sort(dim=0, descending=True).values
    for i in np.flatnonzero(counts):
        last, after = everything[counts[i] - 1, i], everything[counts[i], i]
        expected = (min(float(last), max(cutoffs)) + max(float(after), min(cutoffs))) / 2
        assert float(theta[i]) == pytest.approx(expected, rel=1e-6)


def test_a_window_that_misses_a_cutoff_costs_a_second_pass_and_changes_nothing() -> None:
    batches = made(0, drift=1.0)
    calibrator = Calibrator(30, 4)
    for pre in batches:
        calibrator.update(pre)
    assert not calibrator.window_held
    with pytest.raises(MeasureError, match="again"):
        calibrator.result()
    wide = Calibrator(30, 4, window=(1e-6, 1e6))
    for pre in batches:
        wide.update(pre)
    for rule in RULES:
        assert torch.equal(calibrate(batches, 4, rule), wide.result().thresholds[rule])


def test_ties_are_cut_where_the_count_comes_nearest_and_the_error_is_stated() -> None:
    pre = torch.zeros(8, 2)
    pre[:, 0] = torch.tensor([3.0, 2, 2, 2, 1, 1, 1, 1])
    pre[:, 1] = torch.tensor([5.0, 4, 2, 0, 0, 0, 0, 0])
    # k b = 8 with k = 1: 5 4 3 2 2 2 2 and the first of the ones.
    calibrator = Calibrator(2, 1)
    calibrator.update(pre)
    result = calibrator.result()
    assert result.selected.tolist() == [5, 3]
    fired = (pre > result.thresholds["rate"]).sum(0)
    assert fired.tolist() == [4, 3]  # four fire above 1, eight above less: four is nearer to five
    assert result.off_by == 1


def test_bfloat16_products_keep_the_total_within_the_stated_error() -> None:
    batches = [pre.bfloat16().float() for pre in made(5)]
    calibrator = Calibrator(30, 4, window=(1e-6, 1e6))
    for pre in batches:
        calibrator.update(pre)
    result = calibrator.result()
    fired = (torch.cat(batches) > result.thresholds["rate"]).sum(0).numpy()
    assert np.abs(fired - result.selected).max() == result.off_by


def test_global_is_the_mean_cutoff() -> None:
    batches = made(1, drift=0.3)
    counts, cutoffs = selections(batches, 4)
    theta = calibrate(batches, 4, "global")
    expected = np.where(counts > 0, np.mean(cutoffs), np.inf)
    np.testing.assert_allclose(theta, expected, rtol=1e-6)


def test_eer_is_the_first_bin_where_the_error_rates_cross() -> None:
    batches, width = made(2, n_batches=8, b=200), 0.05
    theta = calibrate(batches, 4, "eer", bin_width=width)
    selected = [
        (pre >= sorted(pre.flatten().tolist())[-4 * len(pre)]) & (pre > 0) for pre in batches
    ]
    mask, everything = torch.cat(selected), torch.cat(batches)
    for i in range(30):
        yes = everything[mask[:, i], i].numpy()
        no = everything[~mask[:, i] & (everything[:, i] > 0), i].numpy()
        if not len(yes):
            assert torch.isinf(theta[i])
            continue
        for edge in np.arange(1, 201) * width:
            if (yes < edge).mean() >= (no >= edge).mean():
                assert float(theta[i]) == pytest.approx(edge - width / 2, abs=1e-5)
                break


def test_eer_with_one_cutoff_puts_every_threshold_into_its_bin() -> None:
    # NOTES 2.6: with equal cut-offs all thresholds are the centre of one bin.
    generator = torch.Generator().manual_seed(0)
    theta = calibrate([torch.randn(4000, 20, generator=generator)], 3, "eer")
    assert len(theta.unique()) == 1


def test_bad_calls_are_one_sentence() -> None:
    batches = made(0)
    with pytest.raises(MeasureError, match="rate, eer, global"):
        calibrate(batches, 4, "median")  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match="list"):
        calibrate(iter(batches), 4)
    with pytest.raises(MeasureError, match="at least one"):
        calibrate([], 4)
    with pytest.raises(MeasureError, match=r"must be \(tokens, 30\)"):
        calibrate([*batches, torch.zeros(4, 29)], 4)
    with pytest.raises(MeasureError, match="train first"):
        calibrate([-torch.ones(4, 5)], 2)
    for k in (0, 31):
        with pytest.raises(MeasureError, match="give 1 to 30"):
            calibrate(batches, k)
    for value in (float("nan"), float("inf"), float("-inf")):
        harmed = batches[0].clone()
        harmed[3, 2] = value
        with pytest.raises(MeasureError, match="not finite"):
            calibrate([*batches, harmed], 4)
    with pytest.raises(MeasureError, match="bin_width above"):
        calibrate([pre * 100 for pre in batches], 4, "eer")


def test_rate_does_not_depend_on_the_histogram() -> None:
    batches = [pre * 100 for pre in made(0)]
    counts, _ = selections(batches, 4)
    assert ((torch.cat(batches) > calibrate(batches, 4, "rate")).sum(0).numpy() == counts).all()


def test_batches_of_a_chunk_hold_every_token_once() -> None:
    chunk = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
    batches = list(training_batches(chunk, 25, seed=1))
    assert [len(z) for z in batches] == [26, 26, 26, 25]
    assert sorted(torch.cat(batches).tolist()) == sorted(chunk.tolist())
    again = list(training_batches(chunk, 25, seed=1))
    assert all(torch.equal(x, y) for x, y in zip(batches, again, strict=True))


def test_pre_activations_round_the_product_alone() -> None:
    sae = BatchTopK(16, 40, 4)
    z = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pre_activations(sae, z, torch.float32), sae.pre_activations(z))
    low = pre_activations(sae, z, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), sae.pre_activations(z), atol=0.02, rtol=0.02)


def test_jumprelu_keeps_the_thresholds_it_was_trained_with() -> None:
    theta = torch.tensor([0.5, 1.0, 9.0])
    own = OwnThresholds(theta)
    for pre in ([[0.6, 1.0, 0.0], [0.5, 2.0, 8.0]], [[3.0, -1.0, 0.0]]):
        own.update(torch.tensor(pre))
    result = own.result()
    assert result.selected.tolist() == [2, 1, 0] and result.n_tokens == 3
    for rule in RULES:
        assert result.threshold(rule).tolist() == [0.5, 1.0, float("inf")]
