"""Matching the features of two dictionaries by the cosine of their decoder rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from metasae_lib.study import MeasureError


def hungarian(W_a: Any, W_b: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One-to-one matching with the largest sum of cosines (§4, App. F: Hungarian matching).

    W_a: (n_a, d), W_b: (n_b, d) decoder rows, tensors or arrays, of any non-zero length; all of
    the smaller dictionary's features are matched. Returns rows (m,), cols (m,) and cosines (m,)
    float32 with m = min(n_a, n_b), rows ascending. Cosines are float32, so that the sum is the
    largest up to about 1e-6 a pair. Raises MeasureError.

    The solver is SciPy's `linear_sum_assignment` (Jonker-Volgenant shortest augmenting paths): it
    is exact, and wants the dense matrix that cosines are anyway. Memory: 12 bytes n_a n_b. At
    20,480 features about 15 s and 5.2 GiB on two cores, for dictionaries that half match; sparse
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
    cost = (unit_a @ unit_b.T).neg_().double().numpy()
    rows, cols = linear_sum_assignment(cost)
    return rows, cols, np.clip(-cost[rows, cols], -1, 1).astype(np.float32)
