from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metasae_lib import Run
from metasae_lib.measure import counting, passes, scan, thresholds
from metasae_lib.measure import cross as crossing
from metasae_lib.measure.counting import CooccurrenceCounter, Counts, CrossCounts
from metasae_lib.measure.cross import check_comparable, top_matches
from metasae_lib.measure.patterns import Pattern, above, add_pairs, count_below
from metasae_lib.measure.phi import (
    abs_phi_blocks,
    enough_tokens,
    noise_floor,
    null_mean_abs,
    phi,
    summarise,
)
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK, normalise


def brute(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    return a.T.astype(np.int64) @ (a if b is None else b).astype(np.int64)


def adversarial(n_tokens: int = 300, n: int = 12) -> np.ndarray:
    """Always on, never on, on once (at either end), twins, opposites, rare and frequent ones."""
    fired = np.random.default_rng(0).random((n_tokens, n)) < np.linspace(0.01, 0.9, n)
    fired[:, 0], fired[:, 1] = True, False
    fired[:, 2], fired[:, 3] = False, False
    fired[0, 2] = fired[-1, 3] = True
    fired[:, 5] = fired[:, 4]
    fired[:, 6] = ~fired[:, 4]
    return fired


def as_inputs(fired: np.ndarray) -> list[object]:
    return [
        fired,
        fired.astype(np.int32),
        np.asfortranarray(fired),
        torch.from_numpy(fired),
        torch.from_numpy(fired).to_sparse_csr(),
        torch.from_numpy(fired).float().to_sparse_csr(),
        torch.from_numpy(fired).to_sparse(),
        scipy.sparse.csr_array(fired),
        scipy.sparse.csc_matrix(fired.astype(np.float32)),
    ]


def counted(fired: np.ndarray) -> Counts:
    counter = CooccurrenceCounter(fired.shape[1])
    counter.update(fired)
    return counter.counts()


def test_every_kind_of_input_gives_the_brute_force_counts() -> None:
    fired = adversarial()
    for given_a in as_inputs(fired):
        counter = CooccurrenceCounter(fired.shape[1])
        counter.update(given_a)
        assert torch.equal(counter.n11, torch.from_numpy(brute(fired)))
        assert torch.equal(counter.n1_a, torch.from_numpy(fired.sum(0)))
        assert torch.equal(counter.n1_b, counter.n1_a)
        assert counter.n_tokens == len(fired)
    other = adversarial(n=7)[::-1].copy()
    for given_a, given_b in zip(as_inputs(fired), as_inputs(other), strict=True):
        counter = CooccurrenceCounter(12, 7)
        counter.update(given_a, given_b)
        assert torch.equal(counter.n11, torch.from_numpy(brute(fired, other)))
        assert torch.equal(counter.n1_b, torch.from_numpy(other.sum(0)))


def test_repeats_disorder_and_stored_zeros_of_a_sparse_input_do_not_count_twice() -> None:
    rows = scipy.sparse.csr_array(
        (np.array([1.0, 1.0, 2.0, 0.0, 1.0]), np.array([3, 0, 3, 1, 2]), np.array([0, 4, 5])),
        (2, 4),
    )
    counter = CooccurrenceCounter(4)
    counter.update(rows)
    expected = np.zeros((4, 4), int)
    expected[np.ix_([0, 3], [0, 3])] = 1
    expected[2, 2] = 1
    assert counter.n11.tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99)
)
def test_any_pattern_in_any_chunks(t: int, n_a: int, n_b: int, rate: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.random((t, n_a)) < rate, generator.random((t, n_b)) < rate
    cut = int(generator.integers(0, t + 1))
    within, between = CooccurrenceCounter(n_a), CooccurrenceCounter(n_a, n_b)
    for part in (slice(0, cut), slice(cut, t)):
        within.update(a[part])
        assert within.n11.diagonal().tolist() == within.n1_a.tolist()  # reading changes nothing
        between.update(a[part], b[part])
    assert within.n11.tolist() == brute(a).tolist()
    assert between.n11.tolist() == brute(a, b).tolist()


@pytest.mark.parametrize("advantage", [0, 1e12])
def test_sparse_and_dense_counting_agree(monkeypatch: pytest.MonkeyPatch, advantage: float) -> None:
    monkeypatch.setattr(counting, "DENSE_ADVANTAGE", advantage)
    monkeypatch.setattr(counting, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(counting, "FLOAT32_EXACT", 64)
    monkeypatch.setattr(counting, "FLUSH_ENTRIES", 500)
    fired, other = adversarial(), adversarial(n=9)
    within, between = CooccurrenceCounter(12), CooccurrenceCounter(12, 9)
    for part in np.array_split(np.arange(300), 7):
        within.update(fired[part])
        between.update(fired[part], other[part])
    assert within.n11.tolist() == brute(fired).tolist()
    assert between.n11.tolist() == brute(fired, other).tolist()


def test_counts_beyond_the_reach_of_float32_and_of_int32() -> None:
    for start in (2**24 - 1, 2**31 - 50):
        counter = CooccurrenceCounter(3)
        state = counter.state()
        state["n11"] = np.full((3, 3), start, np.int32)
        state["n1_a"] = np.full(3, start, np.int64)
        state["n1_b"], state["n_tokens"] = state["n1_a"], np.array(start)
        counter.restore(state)
        counter.update(np.ones((100, 3), bool))
        assert counter.n_tokens == start + 100
        assert (counter.n11 == start + 100).all()
        assert (phi(counter.n11, counter.n1_a, counter.n1_b, start + 200) - 1).abs().max() < 1e-8


def test_a_restored_counter_goes_on_to_the_same_integers() -> None:
    fired = adversarial()
    first = CooccurrenceCounter(12)
    first.update(fired[:100])
    saved = {key: array.copy() for key, array in first.state().items()}
    second = CooccurrenceCounter(12)
    second.restore(saved)
    second.update(fired[100:])
    assert second.n11.tolist() == brute(fired).tolist()


def test_inputs_that_do_not_fit_are_refused() -> None:
    counter = CooccurrenceCounter(4)
    with pytest.raises(MeasureError, match=r"give \(tokens, 4\)"):
        counter.update(np.ones((2, 3), bool))
    with pytest.raises(MeasureError, match="give bool"):
        counter.update(np.ones((2, 4), np.float32))
    with pytest.raises(MeasureError, match="two dictionaries"):
        counter.update(np.ones((2, 4), bool), np.ones((2, 4), bool))
    with pytest.raises(MeasureError, match="the same tokens"):
        CooccurrenceCounter(4, 4).update(np.ones((2, 4), bool), np.ones((3, 4), bool))
    with pytest.raises(MeasureError, match="positive"):
        CooccurrenceCounter(0)


def test_phi_refuses_what_numpy_would_repeat() -> None:
    n11, n1 = np.array([[3, 1], [1, 2]]), np.array([3, 2])
    for together, a, b in (
        (n11[0], n1, n1), (n11, 3, 2), (n11, n1[:1], n1), (n11, n1, n1[:1]), (n11, n1[:, None], n1),
        (np.ones((2, 3), int), np.ones(3, int), np.ones(2, int)),
    ):  # fmt: skip
        for kind in (np.asarray, torch.as_tensor):
            with pytest.raises(MeasureError, match=r"give \(n_a, n_b\) with \(n_a,\)"):
                phi(kind(together), kind(a), kind(b), 10)
    with pytest.raises(MeasureError, match="between 0 and n_tokens, 2"):
        phi(n11, n1, n1, 2)


def above_plain(values: np.ndarray, threshold: np.ndarray) -> tuple[Pattern, np.ndarray]:
    fires = values > threshold
    indptr = np.concatenate([[0], np.cumsum(fires.sum(axis=1))])
    return Pattern(indptr, np.nonzero(fires)[1].astype(np.uint16)), values[fires]


def add_pairs_plain(n11: np.ndarray, a: Pattern, b: Pattern | None = None) -> None:
    for t in range(len(a.indptr) - 1):
        i = a.indices[a.indptr[t] : a.indptr[t + 1]]
        if b is None:
            for p in range(len(i)):
                n11[i[p], i[p + 1 :]] += 1
        else:
            n11[np.ix_(i, b.indices[b.indptr[t] : b.indptr[t + 1]])] += 1


def count_below_plain(
    values: np.ndarray, low: float, counts: np.ndarray, largest: np.ndarray
) -> None:
    inside = (values > 0) & (values <= low)
    counts += inside.sum(axis=0)
    np.maximum(largest, np.where(inside, values, 0).max(axis=0), out=largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_plain_forms(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    given = torch.from_numpy(generator.standard_normal((200, 150))).to(dtype)
    given[3, 5], given[4, 6], given[5] = 1.0, 0.0, -1.0  # a tie, and a row with none
    values = given.float().numpy()
    theta = np.where(np.arange(150) % 7, 1.0, np.inf).astype(np.float32)
    theta[10:14] = [0.0, 1e-3, values[7, 12].clip(0), 0.5001]
    found = above(given, torch.from_numpy(theta))
    (pattern, kept), (plain, plain_kept) = found, above_plain(values, theta)
    assert all(np.array_equal(x, y) for x, y in zip(pattern, plain, strict=True))
    assert np.array_equal(kept, plain_kept) and pattern.indices.dtype == np.uint16
    assert pattern.n_tokens == 200
    higher = np.where(np.arange(150) % 3, np.inf, theta * 2).astype(np.float32)
    for one, two in zip(
        pattern.where(kept > higher[pattern.indices]),
        above_plain(values, np.maximum(theta, higher))[0],
        strict=True,
    ):
        assert np.array_equal(one, two) and one.dtype == two.dtype
    assert np.array_equal(pattern.matrix(150, kept).toarray(), np.where(values > theta, values, 0))
    for other in (None, pattern):
        n11, expected = np.zeros((2, 150, 150), np.int64)
        add_pairs(n11, pattern, other)
        add_pairs_plain(expected, pattern, other)
        assert np.array_equal(n11, expected)
    for low in (0.0, 0.7, 5.0):
        counts, expected = np.zeros((2, 150), np.int64)
        largest, expected_largest = np.zeros((2, 150), np.float32)
        for part in (given[:120], given[120:]):
            assert count_below(part, low, counts, largest)
            part = part.float().numpy()
            count_below_plain(part, np.float32(low), expected, expected_largest)
        assert np.array_equal(counts, expected) and np.array_equal(largest, expected_largest)
        assert counts.sum() == ((values > 0) & (values <= np.float32(low))).sum()
    for infinite in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        given[17, 149] = infinite
        assert not count_below(given, 0.7, counts, largest)


def test_phi_of_hand_worked_and_library_values() -> None:
    # 4 tokens, both fire on 2, together on 1: N N11 - a b = 4 - 4 = 0. Together on 2: φ = 1.
    n1 = np.array([2, 2])
    assert phi(np.array([[2, 1], [1, 2]]), n1, n1, 4).tolist() == [[1, 0], [0, 1]]
    fired = adversarial()
    counts = counted(fired)
    matrix = phi(counts.n11, counts.n1, counts.n1, counts.n_tokens)
    assert np.isnan(matrix[:2]).all() and np.isnan(matrix[:, :2]).all()
    correlation = np.corrcoef(fired[:, 2:].T.astype(float))  # φ is Pearson's r of two indicators
    np.testing.assert_allclose(matrix[2:, 2:], correlation, atol=1e-12)
    as_tensor = phi(torch.from_numpy(counts.n11), counts.n1, counts.n1, counts.n_tokens)
    assert as_tensor.dtype == torch.float64
    np.testing.assert_array_equal(as_tensor.numpy(), matrix)


def test_phi_does_not_overflow_at_paper_scale() -> None:
    n = 35_000_000
    n1 = np.array([30_000_000, 20_000_000], np.int32)
    n11 = np.array([[0, 19_000_000], [0, 0]], np.int32)
    a, b, together = 30_000_000, 20_000_000, 19_000_000
    exact = (n * together - a * b) / math.sqrt(a * (n - a) * b * (n - b))
    assert phi(n11, n1, n1, n)[0, 1] == pytest.approx(exact, rel=1e-12)


@pytest.fixture(scope="module")
def correlated() -> np.ndarray:
    generator = np.random.default_rng(1)
    rates = generator.uniform(0.002, 0.2, 60)
    common = generator.random((4000, 1)) < 0.3
    fired = generator.random((4000, 60)) < rates * np.where(common, 2.0, 0.5)
    fired[:, 7], fired[:, 50], fired[:, 9] = False, True, fired[:, 8]
    return fired


def test_summary_equals_the_full_matrix(correlated: np.ndarray) -> None:
    counts = counted(correlated)
    mask = np.arange(60) % 5 != 0
    for features in (None, mask, np.flatnonzero(mask)[::-1]):
        chosen = np.arange(60) if features is None else np.flatnonzero(mask)
        matrix = phi(counts.n11, counts.n1, counts.n1, counts.n_tokens)[np.ix_(chosen, chosen)]
        upper = matrix[np.triu_indices(len(chosen), 1)]
        values = upper[~np.isnan(upper)]
        quantiles = (0.0, 0.01, 0.37, 0.5, 0.999, 1.0)
        ours = summarise(counts, features, quantiles)
        assert ours.n_pairs == len(values) and ours.n_undefined == len(upper) - len(values) > 0
        assert ours.mean == pytest.approx(values.mean(), rel=1e-12)
        assert ours.mean_abs == pytest.approx(np.abs(values).mean(), rel=1e-12)
        assert ours.std_abs == pytest.approx(np.abs(values).std(), rel=1e-10)
        assert ours.sum_sq == pytest.approx((values**2).sum(), rel=1e-12)
        assert ours.share_negative == (values < 0).mean()
        assert ours.maximum == pytest.approx(values.max(), rel=1e-12)
        assert matrix[tuple(np.searchsorted(chosen, ours.pair))] == pytest.approx(ours.maximum)
        assert ours.median == ours.quantiles[0.5]
        for q in quantiles:
            assert ours.quantiles[q] == pytest.approx(np.quantile(values, q), rel=1e-12, abs=1e-15)
        expected, _ = np.histogram(values, ours.edges)
        assert np.abs(ours.histogram - expected).sum() <= 2  # a value on an edge may go either way
        assert ours.histogram.sum() == ours.n_pairs
        binned = ours.binned()
        assert (binned.density * binned.width).sum() == pytest.approx(1)
        assert ours.by_rate.n_pairs.sum() == ours.n_pairs
        for column, mean in (("mean_abs", ours.mean_abs), ("null_mean_abs", ours.null_mean_abs)):
            weighted = np.average(ours.by_rate[column], weights=ours.by_rate.n_pairs)
            assert weighted == pytest.approx(mean, rel=1e-12)


def test_mean_by_decile_of_rate_equals_the_full_matrix(correlated: np.ndarray) -> None:
    counts = counted(correlated)
    alive = np.flatnonzero(counts.alive)
    ordered = alive[np.argsort(counts.n1[alive], kind="stable")]
    group = {int(i): rank * 10 // len(alive) for rank, i in enumerate(ordered)}
    sizes = np.abs(phi(counts.n11, counts.n1, counts.n1, counts.n_tokens))
    values: dict[tuple[int, int], list[float]] = {}
    for p, i in enumerate(alive):
        for j in alive[p + 1 :]:
            a, b = sorted((group[int(i)], group[int(j)]))
            values.setdefault((a, b), []).append(sizes[i, j])
    table = summarise(counts).by_rate.set_index(["group_a", "group_b"])
    assert set(table.index) == set(values)
    for key, pairs in values.items():
        assert table.loc[key, "mean_abs"] == pytest.approx(np.mean(pairs), rel=1e-12)


def test_summary_is_the_same_for_any_order_of_features(correlated: np.ndarray) -> None:
    order = np.random.default_rng(2).permutation(60)
    one, two = summarise(counted(correlated)), summarise(counted(correlated[:, order]))
    assert one.mean_abs == pytest.approx(two.mean_abs, rel=1e-12)
    assert one.quantiles == pytest.approx(two.quantiles, rel=1e-12)
    assert {int(order[i]) for i in two.pair} == set(one.pair)


def test_too_few_alive_features_are_named() -> None:
    with pytest.raises(MeasureError, match="1 of 3 features"):
        summarise(counted(np.array([[1, 0, 1], [1, 0, 0]], bool)))


def test_null_equals_the_sum_over_the_hypergeometric_distribution() -> None:
    for a, b, n in [(1, 1, 2), (3, 5, 10), (10, 10, 12), (1, 999, 1000), (40, 700, 5000),
                    (2500, 2500, 5000), (300, 300, 100_000), (9000, 30_000, 100_000)]:  # fmt: skip
        x = np.arange(max(0, a + b - n), min(a, b) + 1)
        p = scipy.stats.hypergeom(n, a, b).pmf(x)
        scale = math.sqrt(a * (n - a) * b * (n - b))
        expected = (p * np.abs(n * x - a * b)).sum() / scale
        assert null_mean_abs(a, b, n) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(null_mean_abs(0, 5, 10)) and math.isnan(null_mean_abs(10, 5, 10))


def test_null_at_paper_scale_tends_to_the_noise_floor() -> None:
    n = 35_000_000
    assert noise_floor(n) == pytest.approx(1.35e-4, rel=0.01)  # NOTES
    assert null_mean_abs(n // 3, n // 4, n) == pytest.approx(noise_floor(n), rel=1e-4)
    rare = null_mean_abs(100, 200, n)  # about 2 sqrt(a b) / n: nearly all pairs never meet
    assert rare == pytest.approx(2 * math.sqrt(100 * 200) / n, rel=1e-2)


def shuffled_mean_abs(n1: np.ndarray, n_tokens: int, n_shuffles: int, seed: int) -> np.ndarray:
    """mean |φ| over pairs after shuffling the tokens of each feature, (n_shuffles,)."""
    generator = np.random.default_rng(seed)
    result = np.empty(n_shuffles)
    for shuffle in range(n_shuffles):
        fired = np.zeros((n_tokens, len(n1)), bool)
        for i, count in enumerate(n1):
            fired[generator.choice(n_tokens, size=int(count), replace=False), i] = True
        result[shuffle] = summarise(counted(fired)).mean_abs
    return result


def test_null_equals_shuffling_tokens(correlated: np.ndarray) -> None:
    counts = counted(correlated[:, counted(correlated).alive])
    shuffled = shuffled_mean_abs(counts.n1, counts.n_tokens, n_shuffles=12, seed=3)
    error = shuffled.std(ddof=1) / math.sqrt(len(shuffled))
    closed = summarise(counts).null_mean_abs
    assert abs(shuffled.mean() - closed) < 4 * error
    assert error / closed < 0.01
    # φ of what is shuffled away is really gone: the data's own co-firing lies far above.
    assert summarise(counts).mean_abs > closed + 50 * error


def test_blocks_of_abs_phi_equal_the_matrix(
    correlated: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(correlated)
    alive = np.flatnonzero(counts.alive)
    expected = np.abs(phi(counts.n11, counts.n1, counts.n1, counts.n_tokens))[np.ix_(alive, alive)]
    np.fill_diagonal(expected, 0)
    # The function phi hides the module of its name.
    module = sys.modules["metasae_lib.measure.phi"]
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 13 * len(alive) + 5)
    blocks = list(abs_phi_blocks(counts))
    assert [part.start for part, _ in blocks] == list(range(0, len(alive), 13))
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), expected, rtol=1e-6)


def test_sentence_on_the_length_of_the_scan(correlated: np.ndarray) -> None:
    summary = summarise(counted(correlated))
    assert "would be needed" in enough_tokens(summary)
    assert "stands out" in enough_tokens(summary, change=5.0)


def test_top_matches_equal_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "BLOCK_ENTRIES", 140)  # several blocks of rows
    generator = np.random.default_rng(0)
    a, b = generator.random((500, 30)) < 0.2, generator.random((500, 20)) < 0.2
    a[:, 3], b[:, 4], b[:, 6] = False, a[:, 0], a[:, 0]  # undefined; two equally good matches
    counter = CooccurrenceCounter(30, 20)
    counter.update(a, b)
    cross = counter.cross_counts()
    for of, n11, n1, other in (
        ("a", cross.n11, cross.n1_a, cross.n1_b),
        ("b", cross.n11.T, cross.n1_b, cross.n1_a),
    ):
        table = top_matches(cross, 4, of)
        matrix = phi(n11, n1, other, 500)
        assert list(table.columns) == ["feature", "rank", "match", "phi"]
        for i in range(len(n1)):
            defined = [j for j in range(len(other)) if not np.isnan(matrix[i, j])]
            expected = sorted(defined, key=lambda j: (-abs(matrix[i, j]), j))[:4]
            mine = table[table.feature == i]
            assert mine.match.tolist() == expected
            assert mine["rank"].tolist() == list(range(len(expected)))
            np.testing.assert_array_equal(mine.phi, matrix[i, expected])
    assert table.match[table.feature == 4].iloc[0] == 0
    with pytest.raises(MeasureError, match="give 'a' or 'b'"):
        top_matches(CrossCounts(cross.n11, cross.n1_a, cross.n1_b, 500), of="c")


def test_dictionaries_of_other_residuals_are_refused_by_name(tmp_path) -> None:  # type: ignore[no-untyped-def]
    arms = []
    for name, layer in (("solo-seed0", 17), ("joint-lambda0.3-sigma1-seed0", 18)):
        folder = tmp_path / name / "sae"
        folder.mkdir(parents=True)
        metadata = {"model_name": "m", "hook_name": f"blocks.{layer}.hook_resid_pre"}
        config = {"normalize_activations": "layer_norm", "metadata": metadata}
        (folder / "cfg.json").write_text(json.dumps(config))
        spec, sae = SimpleNamespace(name=name), SimpleNamespace(d_in=8)
        arms.append(SimpleNamespace(spec=spec, sae=sae, folder=tmp_path / name))
    with pytest.raises(MeasureError, match=r"joint-lambda0\.3.*hook is blocks\.17.*blocks\.18"):
        check_comparable(*arms)
    check_comparable(arms[0], arms[0])


def test_partners_are_looked_up_from_both_sides() -> None:
    a, b = adversarial(400, 9), np.random.default_rng(3).random((400, 7)) < 0.2
    n1 = [x.sum(0).astype(np.int64) for x in (a, b)]
    cross = CrossCounts(brute(a, b), n1[0], n1[1], 400)
    table = crossing.partners({("solo", "joint"): cross}, 2)
    for of, one, other in (("a", a, b), ("b", b, a)):
        mine = table[table.of == of]
        assert set(mine.a) == {"solo"} and set(mine.b) == {"joint"}
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.corrcoef(one.T, other.T)[: one.shape[1], one.shape[1] :]
        for row in mine[mine["rank"] == 0].itertuples():
            assert row.phi == pytest.approx(r[row.feature, row.match])
            assert abs(row.phi) == pytest.approx(np.nanmax(np.abs(r[row.feature])))


# --------------------------------------------------------------------------- scans of a run


class FakeResiduals:
    """Five chunks of made-up residuals; the process is killed when it reads chunk `stop`."""

    device = torch.device("cpu")
    n_chunks, n_tokens, stop = 5, 5 * 300, 10**9

    def __init__(self, run: Run, role: str, subject: object = None) -> None:
        self.role = role
        self.inputs = {"role": role}

    def chunk(self, index: int) -> torch.Tensor:
        if self.role == "scan" and index >= FakeResiduals.stop:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(index + 100 * (self.role == "scan"))
        return torch.randn(300, 16, generator=generator)


@pytest.fixture
def arms(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for module in (scan, crossing, thresholds):
        monkeypatch.setattr(module, "Residuals", FakeResiduals)
    return two_arms(run)


def two_arms(run: Run) -> dict[str, Any]:
    found = {}
    for spec in (ArmSpec("solo", 0), ArmSpec("joint", 1, 0.3, 1.0)):
        sae = BatchTopK(16, 60, 4, seed=spec.seed)
        folder = run.folder / spec.name
        sae.save(folder / "sae", {"model_name": "m", "hook_name": "h"})
        found[spec.name] = SimpleNamespace(spec=spec, sae=sae, folder=folder)
    return found


def firing_by_hand(run: Run, sae: BatchTopK) -> np.ndarray:
    chunks = torch.cat([FakeResiduals(run, "scan").chunk(i) for i in range(5)])
    pre = passes.pre_activations(sae, normalise(chunks)[0], torch.bfloat16)
    return (pre > sae.threshold).numpy()


def test_a_scan_in_its_dense_form_equals_the_sparse_one(
    run: Run, arms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The form that a GPU takes, run here."""
    sparse = scan.scan_arms(run, arms)
    add = scan.ArmScan.add

    def dense(self: Any, pre: torch.Tensor) -> None:
        self.device = SimpleNamespace(type="not a CPU")
        add(self, pre)

    monkeypatch.setattr(scan.ArmScan, "add", dense)
    other = Run.open(run.profile, tmp_path / "other")
    again = scan.scan_arms(other, two_arms(other))
    for name in arms:
        assert np.array_equal(sparse[name].n11, again[name].n11)
        assert sparse[name].l0 == again[name].l0
    inputs = [scan.scan_inputs(r, FakeResiduals(r, "scan")) for r in (run, other)]
    for arm in two_arms(run).values():
        made = [scan.counts_artefact(r, arm, i) for r, i in zip((run, other), inputs, strict=True)]
        assert made[0].info["l0"] == made[1].info["l0"]
        for variant in made[0].info["l0"]:
            one, two = (scan.load_counts(m, variant) for m in made)
            assert np.array_equal(one.n11, two.n11)


def test_counts_that_do_not_fit_together_are_made_one_after_the_other(
    run: Run, arms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together, pairs = scan.scan_arms(run, arms), list(permutations(arms))
    crossed = crossing.cross_scan(run, arms, pairs)
    passed: list[str] = []
    through = passes.scan_chunks

    def counted(residuals: Any, what: str, *first: int) -> Any:
        passed.append(what)
        return through(residuals, what, *first)

    for module in (scan, crossing):
        monkeypatch.setattr(module, "scan_chunks", counted)
    one = 4 * 60 * 60  # bytes of the counts of 60 features in int32
    monkeypatch.setattr(passes, "free_memory", lambda device: 1.9 * one / passes.MEMORY_SHARE)
    other = Run.open(run.profile, tmp_path / "other")
    apart = scan.scan_arms(other, again := two_arms(other))
    assert passed == 2 * ["scanning 1 arms"]
    assert all(np.array_equal(apart[name].n11, together[name].n11) for name in arms)
    for pair, cross in crossing.cross_scan(other, again, pairs).items():
        assert np.array_equal(cross.n11, crossed[pair].n11)
    assert passed[2:] == 2 * ["cross counts of 1 pairs of arms"]

    monkeypatch.setattr(passes, "free_memory", lambda device: one)
    with pytest.raises(MeasureError, match=r"the counts of one arm take 0\.0 GB of memory"):
        scan.scan_arms(Run.open(run.profile, tmp_path / "third"), two_arms(run))


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_cooccurrence as test
from metasae_lib import Profile, Run
from metasae_lib.measure import scan, passes, thresholds
scan.Residuals = thresholds.Residuals = test.FakeResiduals
scan._CHECKPOINT_SECONDS = -1
test.FakeResiduals.stop = 3
run = Run.open(Profile.load("tiny"), sys.argv[2])
scan.scan_arms(run, test.two_arms(run))
"""


def test_scan_equals_brute_force_also_after_a_kill(
    run: Run, arms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, here, str(run.folder.parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    read = []
    chunk = FakeResiduals.chunk
    monkeypatch.setattr(
        FakeResiduals, "chunk", lambda self, i: read.append((self.role, i)) or chunk(self, i)
    )
    counts = scan.scan_arms(run, arms)
    assert read == [("scan", 3), ("scan", 4)]  # neither calibrated nor scanned again
    for name, arm in arms.items():
        fired = firing_by_hand(run, arm.sae)
        assert np.array_equal(counts[name].n11, brute(fired))
        assert np.array_equal(counts[name].n1, fired.sum(0))
        assert counts[name].n_tokens == 1500
        assert 2 < counts[name].l0 < 8  # k is 4
    read.clear()
    again = scan.scan_arms(run, arms)
    assert not read and np.array_equal(again["solo-seed0"].n11, counts["solo-seed0"].n11)


def test_counts_under_other_thresholds_equal_brute_force(run: Run, arms: dict[str, Any]) -> None:
    scan.scan_arms(run, arms)
    calibration = thresholds.calibrate_arms(run, arms)["solo-seed0"]
    inputs = scan.scan_inputs(run, FakeResiduals(run, "scan"))  # type: ignore[arg-type]
    arm = arms["solo-seed0"]
    made = run.artefact("counts", {"arm": arm.folder.name, **inputs}, scan.VERSION)
    chunks = torch.cat([FakeResiduals(run, "scan").chunk(i) for i in range(5)])
    pre = passes.pre_activations(arm.sae, normalise(chunks)[0], torch.bfloat16)
    for name, theta in (
        ("base", calibration.thresholds["rate"]),
        ("scale-0.9", calibration.thresholds["rate"] * np.float32(0.9)),
        ("scale-1.1", calibration.thresholds["rate"] * np.float32(1.1)),
        ("rule-eer", calibration.thresholds["eer"]),
        ("rule-global", calibration.thresholds["global"]),
    ):
        fired = (pre > theta).numpy()
        counts = scan.load_counts(made, name)
        assert np.array_equal(counts.n11, brute(fired)), name
        assert made.info["l0"][name] == pytest.approx(fired.sum() / 1500)


def test_cross_counts_equal_brute_force_and_are_kept(run: Run, arms: dict[str, Any]) -> None:
    pair = a, b = tuple(arms)
    cross = crossing.cross_scan(run, arms, [pair])[pair]
    fired = [firing_by_hand(run, arms[name].sae) for name in (a, b)]
    assert np.array_equal(cross.n11, brute(*fired))
    assert np.array_equal(cross.n1_a, fired[0].sum(0))
    assert np.array_equal(cross.n1_b, fired[1].sum(0))
    again = crossing.cross_scan(run, arms, [pair])[pair]
    assert np.array_equal(again.n11, cross.n11) and again.n_tokens == 1500
