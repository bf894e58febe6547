"""Whether two dictionaries have the same features, by the cosine of their decoder rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metasae_lib.study import MeasureError, Run
from metasae_lib.train import Arm, BatchTopK

_ROWS = 4096  # compared at once: cosines of all pairs are 17 GB at 65,536 features


def hungarian(W_a: Any, W_b: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One-to-one matching with the largest sum of cosines (§4, App. F: Hungarian matching).

    W_a: (n_a, d), W_b: (n_b, d) decoder rows, tensors or arrays, of any non-zero length; all of
    the smaller dictionary's features are matched. Returns rows (m,), cols (m,) and cosines (m,)
    float32 with m = min(n_a, n_b), rows ascending. Cosines are float32, so that the sum is the
    largest up to about 1e-6 a pair. Raises MeasureError.

    The solver is SciPy's `linear_sum_assignment` (Jonker-Volgenant shortest augmenting paths): it
    is exact, and wants the dense matrix that cosines are anyway. Memory: 8 bytes n_a n_b. At
    20,480 features about 15 s and 3.5 GiB on two cores, for dictionaries that half match; sparse
    solvers would need a cut-off on the cosine that the paper does not print.
    """
    a, b = (torch.as_tensor(W).detach().float().cpu() for W in (W_a, W_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise MeasureError(
            f"decoders of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be matched: "
            f"both must be (features, d) with the same d"
        )
    for W in (a, b):
        if not W.isfinite().all() or (W.norm(dim=1) == 0).any():
            raise MeasureError("a decoder row is zero or not finite: it has no direction to match")
    unit_a, unit_b = (W / W.norm(dim=1, keepdim=True) for W in (a, b))
    # SciPy works in float64 and would make one more copy to maximise.
    cost = np.empty((len(a), len(b)))
    for part, some in zip(torch.from_numpy(cost).split(_ROWS), unit_a.split(_ROWS), strict=True):
        part.copy_(some @ unit_b.T).neg_()
    rows, cols = linear_sum_assignment(cost)
    return rows, cols, np.clip(-cost[rows, cols], -1, 1).astype(np.float32)


def row_cosine(W_a: Tensor, W_b: Tensor) -> float:
    """Mean cosine of row i of one decoder with row i of the other."""
    parts = zip(W_a.split(_ROWS), W_b.split(_ROWS), strict=True)
    return float(
        torch.cat([torch.cosine_similarity(a.double(), b.double()) for a, b in parts]).mean()
    )


def pw_mcc(W_a: Tensor, W_b: Tensor) -> float:
    """Pairwise mean maximum cosine: each row with the nearest of the other, both ways, averaged.

    Rows in random directions have about √(2 ln n / d).
    """
    a, b = (torch.nn.functional.normalize(W.float(), dim=1) for W in (W_a, W_b))
    of_a, of_b = [], b.new_full([len(b)], -torch.inf)
    for some in a.split(_ROWS):
        cosines = some @ b.T
        of_a.append(cosines.amax(dim=1))
        of_b = of_b.maximum(cosines.amax(dim=0))
    return float(torch.cat(of_a).double().mean() + of_b.double().mean()) / 2


def same_features(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Is feature i still the same feature: against its start, its partner, and other seeds.

    Of the solo arms and the arms of the selected setting. Columns: comparison, of (`row`: feature i
    with feature i; `nearest`: with the nearest of all), cosine (mean over pairs of dictionaries),
    least, largest (of them), pairs.
    """
    kinds: dict[str, dict[int, Tensor]] = {"solo": {}, "joint": {}, "start": {}}
    for arm in arms.values():
        spec = arm.spec
        if spec.kind == "solo" or (
            spec.kind == "joint" and (spec.lambda2, spec.sigma_sq) == run.profile.selected
        ):
            sae = arm.sae
            kinds[spec.kind][spec.seed] = sae.directions
            fresh = BatchTopK(sae.d_in, sae.n_features, sae.k, spec.seed)
            kinds["start"][spec.seed] = fresh.W_dec.to(sae.directions)
    solo, joint, start = kinds.values()
    given = {n: arm.sae.directions for n, arm in arms.items()
             if arm.spec.kind in run.profile.training.given}  # fmt: skip

    def same_seed(a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(a[seed], b[seed]) for seed in a if seed in b]

    others = [(solo[a], joint[b]) for a in solo for b in joint if a != b]
    wanted: list[tuple[str, str, Iterable[tuple[Tensor, Tensor]]]] = [
        ("solo and its start", "row", same_seed(solo, start)),
        ("joint and its start", "row", same_seed(joint, start)),
        ("joint and its solo partner", "row", same_seed(solo, joint)),
        ("joint and another seed's solo", "row", others),
        ("joint and its solo partner", "nearest", same_seed(solo, joint)),
        ("two solo seeds", "nearest", combinations(solo.values(), 2)),
        ("two joint seeds", "nearest", combinations(joint.values(), 2)),
        ("joint and another seed's solo", "nearest", others),
        ("random directions", "nearest", combinations(start.values(), 2)),
        *(
            (f"{n} and a solo", "nearest", product([rows], solo.values()))
            for n, rows in given.items()
        ),
    ]
    rows = []
    for comparison, of, pairs in wanted:
        measure = row_cosine if of == "row" else pw_mcc
        found = [measure(a, b) for a, b in pairs]
        if found:
            rows.append((comparison, of, np.mean(found), min(found), max(found), len(found)))
    columns = ["comparison", "of", "cosine", "least", "largest", "pairs"]
    return pd.DataFrame(rows, columns=columns)
