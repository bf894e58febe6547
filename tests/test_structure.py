"""Pairs above chance and their clusters: against SciPy's tail, its step-up, and planted worlds."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from metasae_lib import Run
from metasae_lib.measure import links_table, phi, shifted_counts, structure_table, summarise
from metasae_lib.measure import null_mean_abs as expected_abs
from metasae_lib.measure.counting import CooccurrenceCounter, Counts
from metasae_lib.measure.passes import Entered
from metasae_lib.measure.structure import Structure
from metasae_lib.measure.structure import structure as structure_of
from metasae_lib.show import cases
from metasae_lib.train import BatchTopK


def counted(fired: np.ndarray) -> Counts:
    counter = CooccurrenceCounter(fired.shape[1])
    counter.update(fired)
    return counter.counts()


def found(fired: np.ndarray, rate: float = 0.05) -> Structure:
    counts = counted(fired)
    return structure_of(counts, summarise(counts), rate)


def blended(seed: int = 0, n_tokens: int = 400) -> np.ndarray:
    """Features from independent to nearly equal, two that are dead, one that always fires."""
    rng = np.random.default_rng(seed)
    common = rng.random((n_tokens, 3)) < 0.2
    fired = rng.random((n_tokens, 40)) < rng.uniform(0.01, 0.5, 40)
    mixed = rng.random((n_tokens, 18)) < rng.uniform(0.05, 0.9, 18)
    fired[:, :18] |= mixed & np.repeat(common, 6, axis=1)
    fired[:, 30:32], fired[:, 39] = False, True
    return fired


@pytest.mark.parametrize("rate", [0.5, 0.05, 1e-4])
def test_pairs_above_chance_against_scipy(rate: float) -> None:
    fired = blended()
    counts, ours = counted(fired), found(fired, rate)
    alive = np.flatnonzero(counts.alive)
    a, b = (alive[side] for side in np.triu_indices(len(alive), 1))
    n, n1 = counts.n_tokens, counts.n1
    p = stats.hypergeom.sf(counts.n11[a, b] - 1, n, n1[a], n1[b])
    above = stats.false_discovery_control(p, method="by") <= rate
    assert 0 < above.sum() < len(above) / 2
    assert ours.n_pairs == len(above)
    theirs = set(zip(a[above].tolist(), b[above].tolist(), strict=True))
    assert set(zip(ours.pairs.a, ours.pairs.b, strict=True)) == theirs
    by_hand = [
        np.corrcoef(fired[:, i], fired[:, j])[0, 1] for i, j in ours.pairs[["a", "b"]].values
    ]
    np.testing.assert_allclose(ours.pairs.phi, by_hand, rtol=1e-5)

    values = np.abs(phi(counts.n11, n1, n1, n)[a, b])
    null = np.array([expected_abs(n1[i], n1[j], n) for i, j in zip(a, b, strict=True)])
    share = (values - null)[above].sum() / (values - null).sum()
    assert ours.excess_share == pytest.approx(share, rel=1e-5)


def test_independent_features_give_no_more_than_the_stated_rate() -> None:
    """No pair is real, so a set with any pair at all is wholly false: at most 5% of the sets."""
    rng = np.random.default_rng(1)
    rates = rng.uniform(0.02, 0.3, 30)
    wrong = sum(len(found(rng.random((500, 30)) < rates).pairs) > 0 for _ in range(60))
    assert wrong <= stats.binom.ppf(0.999, 60, 0.05)


def test_planted_clusters_are_found_and_nothing_else() -> None:
    """Features 0-3, 4-5 and 6-8 mostly fire on events of their own, the rest alone."""
    rng = np.random.default_rng(2)
    events = rng.random((4000, 3)) < 0.05
    fired = rng.random((4000, 30)) < 0.05
    for event, members in zip(events.T, (range(4), (4, 5), (6, 7, 8)), strict=True):
        for i in members:
            fired[:, i] = event & (rng.random(4000) < 0.95)
    ours = found(fired[:, ::-1])  # the largest is not the first
    assert [c.tolist() for c in ours.clusters()] == [[26, 27, 28, 29], [21, 22, 23], [24, 25]]
    assert ours.clusters(1.01) == []
    row = structure_table({"x": ours}).iloc[0]
    assert (row.clusters, row.largest, row.clustered) == (3, 4, 9)
    assert row.above_pct == pytest.approx(100 * row.pairs_above / (30 * 29 / 2))
    arms = pd.DataFrame({"arm": ["x", "y"], "kind": ["solo", "joint"], "seed": 0})
    links = links_table(arms, {"x": ours, "y": found(fired[:, 4:])}, [0.5, 0.7])
    assert links.clustered.tolist() == [9, 9, 5, 5]
    assert links.change_pct.tolist() == pytest.approx([0, 0, -400 / 9, -400 / 9])


def test_a_chain_of_links_is_one_cluster() -> None:
    """Against union by hand on random pairs, weaker ones left out."""
    rng = np.random.default_rng(3)
    fired = blended(3, 800)
    ours = found(fired, 0.5)
    link = float(ours.pairs.phi.median())
    parent = list(range(40))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    edges = ours.pairs[ours.pairs.phi >= link][["a", "b"]].to_numpy()
    for i, j in rng.permutation(edges):
        parent[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in range(40):
        groups.setdefault(root(i), []).append(i)
    expected = {tuple(group) for group in groups.values() if len(group) > 1}
    clusters = ours.clusters(link)
    assert {tuple(c.tolist()) for c in clusters} == expected
    assert [len(c) for c in clusters] == sorted(map(len, expected), reverse=True)


def test_shifted_counts_pair_each_half_with_the_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two features of one burst fire together, and not with the other half of the text."""
    module = sys.modules[Structure.__module__]  # its name in the room is the function's
    values = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    stand = SimpleNamespace(inputs={}, device=torch.device("cpu"))
    monkeypatch.setattr(module, "Residuals", lambda run, role: stand)
    monkeypatch.setattr(module, "calibrate_arms", lambda run, arms: {})
    monkeypatch.setattr(module, "scan_inputs", lambda run, residuals: {})
    read = [Entered(part) for part in values.split(5)]  # of an odd part the last is left out
    parts = [part.z for part in read]
    monkeypatch.setattr(module, "scan_chunks", lambda residuals, what: [(0, iter(read))])
    monkeypatch.setattr(module, "product_dtype", lambda run: torch.float32)
    sae = BatchTopK(6, 6, 2)
    sae.W_enc.data, sae.threshold = torch.eye(6), torch.full((6,), 0.3)
    arms: Any = {"a": SimpleNamespace(sae=sae, folder=SimpleNamespace(name="arm-x"))}
    ours = shifted_counts(run, arms)["a"]
    fired = [(part > 0.3).numpy().astype(int) for part in parts]
    expected = sum(f[:2].T @ f[2:4] + f[2:4].T @ f[:2] for f in fired)
    np.testing.assert_array_equal(ours.n11, expected)
    np.testing.assert_array_equal(ours.n1, sum(f[:4].sum(axis=0) for f in fired))
    assert ours.n_tokens == 8


def test_the_drawn_cluster_is_small_and_named() -> None:
    """Of clusters of four, three and two the one of three, the most frequent feature first."""
    rng = np.random.default_rng(4)
    fired = rng.random((2000, 12)) < 0.05
    for members in (range(4), (4, 5, 6), (7, 8)):
        fired[:, members] = (rng.random(2000) < 0.1)[:, None]
    fired[:, 4] &= rng.random(2000) < 0.8
    example = SimpleNamespace(pieces=["a", " `b"], peak=1, text="a `b", origin="a book")
    contexts: Any = SimpleNamespace(top=lambda feature, count: [example] if feature != 5 else [])
    about, values = cases.drawn_cluster(found(fired), counted(fired), contexts, most=3)
    assert about.feature.tolist() == [5, 6, 4] and about.peak.tolist() == ["", "`ˋb`", "`ˋb`"]
    assert about.context.tolist() == ["", "`a ˋb` (a book)", "`a ˋb` (a book)"]
    assert values.feature.tolist() == ["5 “”", "6 “ˋb”", "4 “ˋb”"]
    np.testing.assert_allclose(values[[5, 6, 4]], np.corrcoef(fired[:, [5, 6, 4]].T), rtol=1e-9)
    none = cases.drawn_cluster(found(fired[:, 9:]), counted(fired[:, 9:]), contexts)
    assert none[0].empty and none[1].empty
