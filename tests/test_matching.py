from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from metasae_lib.measure import matching
from metasae_lib.measure.matching import hungarian
from metasae_lib.study.errors import MeasureError


def test_a_shuffled_copy_is_found_again() -> None:
    W = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    rows, cols, cosines = hungarian(W, 3 * W[order])
    assert rows.tolist() == list(range(300))
    assert order[cols].tolist() == rows.tolist()
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_no_other_matching_has_a_larger_sum(n_a: int, n_b: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    W_a, W_b = generator.standard_normal((n_a, 3)), generator.standard_normal((n_b, 3))
    cosine = (W_a / np.linalg.norm(W_a, axis=1, keepdims=True)) @ (
        W_b / np.linalg.norm(W_b, axis=1, keepdims=True)
    ).T
    rows, cols, cosines = hungarian(W_a, W_b)
    assert len(set(rows)) == len(set(cols)) == min(n_a, n_b)
    np.testing.assert_allclose(cosines, cosine[rows, cols], atol=1e-6)
    wide = cosine if n_a <= n_b else cosine.T
    best = max(
        wide[np.arange(len(wide)), list(p)].sum()
        for p in permutations(range(wide.shape[1]), len(wide))
    )
    assert cosines.sum() == pytest.approx(best, abs=1e-5)


def test_cosines_are_made_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all of them in float64, of 30 and 40 rows; 7 do not divide either."""
    monkeypatch.setattr(matching, "_ROWS", 7)
    generator = np.random.default_rng(0)
    W_a, W_b = generator.standard_normal((30, 5)), generator.standard_normal((40, 5))
    cosine = (W_a / np.linalg.norm(W_a, axis=1, keepdims=True)) @ (
        W_b / np.linalg.norm(W_b, axis=1, keepdims=True)
    ).T
    rows, cols, cosines = matching.hungarian(W_a, W_b)
    np.testing.assert_array_equal((rows, cols), linear_sum_assignment(cosine, maximize=True))
    np.testing.assert_allclose(cosines, cosine[rows, cols], atol=1e-6)
    found = matching.pw_mcc(torch.from_numpy(W_a), torch.from_numpy(W_b))
    assert found == pytest.approx((cosine.max(0).mean() + cosine.max(1).mean()) / 2, abs=1e-6)
    found = matching.row_cosine(torch.from_numpy(W_a), torch.from_numpy(W_b[:30]))
    assert found == pytest.approx(cosine.diagonal().mean(), abs=1e-12)


def test_rows_without_a_direction_and_other_widths_are_refused() -> None:
    with pytest.raises(MeasureError, match="same d"):
        hungarian(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(MeasureError, match="zero or not finite"):
        hungarian(torch.ones(2, 3), torch.zeros(2, 3))
