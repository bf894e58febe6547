"""Co-occurrence as structure: which pairs fire together more than chance, and their clusters.

The mean of |φ| is over millions of pairs, of which most are independent or exclude each other. Here
each pair is held against its own chance: with the marginals fixed, N11 of independent features is
hypergeometric, and p = P(N11' ≥ N11) is exact. Benjamini and Yekutieli's procedure keeps the
expected share of false ones among the pairs that are called *above chance* under a stated rate,
however the pairs depend on each other (two pairs that share a feature do).

That null takes tokens as independent, and a text is not: a topic lasts. So the same is counted
with one side of every pair moved to another place of the text (`shifted_counts`): what is above
chance there is a matter of pages, not of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numba import njit, prange
from scipy.sparse import csgraph, csr_array

from metasae_lib.measure.counting import CooccurrenceCounter, Counts
from metasae_lib.measure.cross import firing
from metasae_lib.measure.passes import (
    by_arm,
    counts_bytes,
    in_memory,
    pre_activations,
    product_dtype,
    scan_chunks,
)
from metasae_lib.measure.patterns import Array
from metasae_lib.measure.phi import PhiSummary, log_choices, log_factorial, null_abs, pair_phi
from metasae_lib.measure.scan import load_counts, save_counts, scan_inputs
from metasae_lib.measure.thresholds import calibrate_arms
from metasae_lib.study import Artefact, Run
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm, Dictionary

FALSE_DISCOVERIES = 0.05  # expected share of chance pairs among those above chance, at most
LINK = 0.5  # φ from which a pair above chance links two features; the rule of splits has it too
_ROWS = 512  # of the matrix of p values that is in memory
_VERSION = 1


@dataclass(frozen=True)
class Structure:
    """The pairs of one dictionary that fire together more than chance has it.

    n_pairs: pairs tested (both features alive). pairs: those above chance, columns a, b (features,
    a < b) and phi. excess_share: their part of what mean |φ| has above its null over all pairs.
    n_features: of the dictionary.
    """

    n_features: int
    n_pairs: int
    pairs: pd.DataFrame
    excess_share: float

    def clusters(self, link: float = LINK) -> list[Array]:
        """Features that pairs above chance with φ ≥ link join, directly or through others.

        Connected components of two features and more, the largest first; each ascending.
        """
        edges = self.pairs[self.pairs.phi >= link]
        shape = self.n_features, self.n_features
        graph = csr_array((np.ones(len(edges)), (edges.a, edges.b)), shape)
        _, label = csgraph.connected_components(graph, directed=False)
        sizes = np.bincount(label)
        order = np.argsort(-sizes, kind="stable")
        return [np.flatnonzero(label == c) for c in order[: int((sizes > 1).sum())]]


def structure(
    counts: Counts, summary: PhiSummary, false_discoveries: float = FALSE_DISCOVERIES
) -> Structure:
    """The pairs above chance of a scan; summary: `phi.summarise` of the same counts.

    Memory: blocks of rows of the counts, and 20 bytes for each pair whose p is at most
    `false_discoveries` over Σ 1/i, below which every threshold of the procedure lies.
    """
    index = np.flatnonzero(counts.alive)
    n1, n = counts.n1[index].astype(np.int64), counts.n_tokens
    log_ways = np.array([log_choices(a, n) for a in n1]) - log_factorial(n) / 2
    m = summary.n_pairs
    # Σ 1/i up to m, as Euler has it.
    least = np.log(false_discoveries / (np.log(m) + np.euler_gamma + 1 / (2 * m)))
    found: list[tuple[Array, ...]] = []
    for first in range(0, len(index), _ROWS):
        block = np.ascontiguousarray(counts.n11[index[first : first + _ROWS]][:, index])
        log_p, phi, excess = _test(block, first, n1, n, log_ways, least)
        u, v = (each.astype(np.int32) for each in np.nonzero(log_p <= least))
        found.append((u + first, v, log_p[u, v], phi[u, v], excess[u, v]))
    a, b, log_p, phi, excess = (np.concatenate(part) for part in zip(*found, strict=True))
    # Step up: the largest k whose k-th smallest p is at most k times the least threshold over m.
    below = np.sort(log_p) <= least + np.log(np.arange(1, len(log_p) + 1) / m)
    kept = log_p <= (np.sort(log_p)[below][-1] if below.any() else -np.inf)
    return Structure(
        n_features=len(counts.n1),
        n_pairs=m,
        pairs=pd.DataFrame({"a": index[a[kept]], "b": index[b[kept]], "phi": phi[kept]}),
        excess_share=float(excess[kept].sum(dtype=np.float64))
        / (m * (summary.mean_abs - summary.null_mean_abs)),
    )


@njit(parallel=True, cache=True)
def _test(
    n11: Array, first: int, n1: Array, n: int, log_ways: Array, least: float
) -> tuple[Array, Array, Array]:
    """log p of the pairs of some rows where it is at most `least` (elsewhere ∞), φ, and |φ| above
    its null; float32 (r, m). log_ways: such that two of them make a pair's constant."""
    shape = n11.shape
    log_p = np.full(shape, np.inf, np.float32)
    phi, excess = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i in prange(shape[0]):
        u = first + i
        for v in range(u + 1, shape[1]):
            a, b, x = n1[u], n1[v], n11[i, v]
            value, scale = pair_phi(x, a, b, n)
            if value <= 0:
                continue  # p is about a half or more
            ways = log_ways[u] + log_ways[v]
            tail = _log_tail(x, a, b, n, ways, least)
            if tail <= least:
                log_p[i, v], phi[i, v] = tail, value
                excess[i, v] = value - null_abs(a, b, n, ways) / scale
    return log_p, phi, excess


@njit(cache=True)
def _log_tail(x: int, a: int, b: int, n: int, ways: float, least: float) -> float:
    """log P(N11 ≥ x) for x above the mean; any larger value than `least` stands for a larger p."""
    log_first = ways - log_factorial(x) - log_factorial(a - x)
    log_first = log_first - log_factorial(b - x) - log_factorial(n - a - b + x)
    total = term = 1.0
    most = np.exp(least - log_first)
    y = x
    while term > 1e-12 * total and total <= most:
        term *= float(a - y) * float(b - y) / (float(y + 1) * float(n - a - b + y + 1))
        total += term
        y += 1
    return log_first + np.log(total)


def structure_table(found: Mapping[str, Structure]) -> pd.DataFrame:
    """One row an arm, by name.

    Columns: arm, pairs_above (chance), above_pct (of all pairs), excess_pct (their part of what
    mean |φ| has above its null), clusters, largest (features in it), clustered (features in any).
    """
    rows = []
    for name, one in found.items():
        sizes = [len(cluster) for cluster in one.clusters()]
        above = len(one.pairs)
        rows.append((name, above, 100 * above / one.n_pairs, 100 * one.excess_share, len(sizes),
                     max(sizes, default=0), sum(sizes)))  # fmt: skip
    columns = ["arm", "pairs_above", "above_pct", "excess_pct", "clusters", "largest", "clustered"]
    return pd.DataFrame(rows, columns=columns)


def links_table(
    arms: pd.DataFrame, found: Mapping[str, Structure], links: Sequence[float]
) -> pd.DataFrame:
    """How many features are in clusters, by the φ that makes a link.

    arms: columns arm, kind, seed. Columns: these, link, clustered, change_pct (against the solo arm
    of the same seed).
    """
    rows = [
        (name, link, sum(map(len, one.clusters(link))))
        for name, one in found.items()
        for link in links
    ]
    table = arms.merge(pd.DataFrame(rows, columns=["arm", "link", "clustered"]))
    solo = table[table.kind == "solo"].rename(columns={"clustered": "solo"})
    table = table.merge(solo[["seed", "link", "solo"]], how="left")
    return table.assign(change_pct=100 * (table.clustered / table.pop("solo") - 1))


def shifted_counts(run: Run, arms: Mapping[str, Arm]) -> dict[str, Counts]:
    """Counts of every arm in which the two features of a pair look at different text; artefacts.

    The scan is read in parts of `passes.GROUP` tokens, and one side of every pair is moved by half
    a part, further than the longest piece of a document reaches. Features keep their rates, and
    the way in which topics make them fire in bursts; what they have to do with each other is gone.
    n11 is symmetric, its diagonal means nothing.
    """
    calibrate_arms(run, arms)
    residuals, dtype = Residuals(run, "scan"), product_dtype(run)

    def count(saes: Mapping[str, Dictionary]) -> dict[str, CooccurrenceCounter]:
        counters = {
            name: CooccurrenceCounter(sae.n_features, sae.n_features, residuals.device)
            for name, sae in saes.items()
        }
        for _, parts in scan_chunks(residuals, f"shifted counts of {len(saes)} arms"):
            for tokens in parts:
                half = len(tokens) // 2
                for name, counter in counters.items():
                    pre = pre_activations(saes[name], tokens.of(saes[name]), dtype)
                    a, b = (firing(x, saes[name].threshold) for x in pre[: 2 * half].split(half))
                    counter.update(a, b)
                    counter.update(b, a)
        return counters

    def make(missing: dict[str, Artefact]) -> None:
        what = "the shifted counts of one arm"
        for group in in_memory(list(missing), counts_bytes(arms), what, residuals.device):
            for name, counter in count({name: arms[name].sae for name in group}).items():
                cross = counter.cross_counts()
                save_counts(missing[name], "n11", Counts(cross.n11, cross.n1_a, cross.n_tokens))
                missing[name].finish({"n_tokens": cross.n_tokens})

    inputs = by_arm(arms, scan_inputs(run, residuals))
    made = run.made("shifted-counts", inputs, _VERSION, make)
    return {name: load_counts(artefact, "n11") for name, artefact in made.items()}
