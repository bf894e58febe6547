"""Co-occurrence between the features of two dictionaries, and who is whose partner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from metasae_lib.measure.counting import CooccurrenceCounter, CrossCounts
from metasae_lib.measure.passes import (
    counts_bytes,
    in_memory,
    pre_activations,
    product_dtype,
    scan_chunks,
)
from metasae_lib.measure.patterns import above
from metasae_lib.measure.phi import BLOCK_ENTRIES, phi
from metasae_lib.measure.scan import VERSION, scan_inputs
from metasae_lib.measure.thresholds import calibrate_arms
from metasae_lib.study import Artefact, MeasureError, Run, atomic_write
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm


def check_comparable(arm_a: Arm, arm_b: Arm) -> None:
    """Refuse two arms whose dictionaries read different residuals, and say what differs."""
    about = []
    for arm in (arm_a, arm_b):
        config = json.loads((arm.folder / "sae" / "cfg.json").read_text(encoding="utf-8"))
        metadata = config.get("metadata", {})
        about.append(
            {
                "language model": metadata.get("model_name"),
                "hook": metadata.get("hook_name"),
                "d_in": arm.sae.d_in,
            }
        )
    for what, value in about[0].items():
        if value != about[1][what]:
            raise MeasureError(
                f"{arm_a.spec.name} and {arm_b.spec.name} cannot be compared: their {what} is "
                f"{value} and {about[1][what]}; take two dictionaries of the same residuals"
            )


def cross_scan(
    run: Run, arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], CrossCounts]:
    """Counts between the features of pairs of arms, by name, in one pass over the scan role, or in
    as few as memory allows.

    Counts are artefacts. Raises MeasureError if the two of a pair were not trained on the same
    kind of residuals.
    """
    for a, b in pairs:
        check_comparable(arms[a], arms[b])
    used = {name: arms[name] for pair in pairs for name in pair}
    calibrate_arms(run, used)
    residuals = Residuals(run, "scan")

    def make(missing: dict[tuple[str, str], Artefact]) -> None:
        what = "the counts of one pair of arms"
        for group in in_memory(list(missing), counts_bytes(used), what, residuals.device):
            for pair, cross in _cross(run, residuals, arms, group).items():
                with atomic_write(missing[pair].folder / "n11.npy") as path:
                    np.save(path, cross.n11)
                with atomic_write(missing[pair].folder / "n1.npz") as path:
                    np.savez(path, a=cross.n1_a, b=cross.n1_b)
                missing[pair].finish({"n_tokens": cross.n_tokens})

    on = scan_inputs(run, residuals)
    inputs = {(a, b): {"a": used[a].folder.name, "b": used[b].folder.name, **on} for a, b in pairs}
    artefacts = run.made("cross-counts", inputs, VERSION, make)
    return {pair: _load_cross(artefact) for pair, artefact in artefacts.items()}


def _cross(
    run: Run, residuals: Residuals, arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], CrossCounts]:
    dtype = product_dtype(run)
    used = {name: arms[name].sae for pair in pairs for name in pair}
    counters = {
        (a, b): CooccurrenceCounter(used[a].n_features, used[b].n_features, residuals.device)
        for a, b in pairs
    }
    for _, parts in scan_chunks(residuals, f"cross counts of {len(pairs)} pairs of arms"):
        for tokens in parts:
            fired = {
                name: firing(pre_activations(sae, tokens.of(sae), dtype), sae.threshold)
                for name, sae in used.items()
            }
            for (a, b), counter in counters.items():
                counter.update(fired[a], fired[b])
    return {pair: counter.cross_counts() for pair, counter in counters.items()}


def firing(pre: Tensor, threshold: Tensor | None) -> Any:
    """What exceeds the thresholds: a pattern on the CPU, a bool matrix on a GPU."""
    assert threshold is not None
    if pre.device.type == "cpu":
        return above(pre, threshold)[0]
    return pre > threshold


def _load_cross(artefact: Artefact) -> CrossCounts:
    n_tokens = artefact.info["n_tokens"]
    with np.load(artefact.folder / "n1.npz") as n1:
        n11 = np.load(artefact.folder / "n11.npy", mmap_mode="r")
        return CrossCounts(n11, n1["a"], n1["b"], n_tokens)


def top_matches(cross: CrossCounts, m: int = 5, of: str = "a") -> pd.DataFrame:
    """The m features of the other dictionary with the largest |φ|, for every feature of one.

    of: "a" or "b", the dictionary whose features are looked up. Columns: feature, rank (from 0),
    match, phi. Ties go to the lower feature; features without a defined φ are left out.
    """
    if of not in ("a", "b"):
        raise MeasureError(f"of is '{of}': give 'a' or 'b'")
    n11, n1, n1_other = cross.n11, cross.n1_a, cross.n1_b
    if of == "b":
        n11, n1, n1_other = n11.T, n1_other, n1
    m = min(m, len(n1_other))
    parts = []
    step = max(1, BLOCK_ENTRIES // len(n1_other))
    for row in range(0, len(n1), step):
        rows = slice(row, row + step)
        values = phi(np.asarray(n11[rows]), n1[rows], n1_other, cross.n_tokens)
        size = np.nan_to_num(np.abs(values), nan=-1.0)
        # A stable sort of the few that reach the m-th largest keeps ties in order.
        cut = -np.partition(-size, m - 1, axis=1)[:, m - 1 : m]
        feature, match = np.nonzero((size >= cut) & (size >= 0))
        order = np.lexsort((match, -size[feature, match], feature))
        feature, match = feature[order], match[order]
        rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
        found = {"feature": feature + row, "rank": rank, "match": match}
        table = pd.DataFrame(found | {"phi": values[feature, match]})
        parts.append(table[rank < m])
    return pd.concat(parts, ignore_index=True)


def partners(crosses: Mapping[tuple[str, str], CrossCounts], m: int = 3) -> pd.DataFrame:
    """:func:`top_matches` of several pairs (a, b) of arms, in both directions.

    Columns besides: a, b, of (whose features are looked up).
    """
    return pd.concat(
        [
            top_matches(cross, m, of).assign(a=a, b=b, of=of)
            for (a, b), cross in crosses.items()
            for of in ("a", "b")
        ],
        ignore_index=True,
    )
