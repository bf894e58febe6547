"""The inner loops of a training step: exact batch top-k, sparse decoding, fused row updates.

BatchTopK keeps ``k`` of ``n`` activations per token, so that all of a training step but the encoder
product needs only those. On a CPU the loops below are compiled by numba; each stands beside its
plain torch form, which does the same with dense matrices: it is what runs on a GPU and what the
compiled form is tested against.

Every output row is summed by one thread in a fixed order: the result does not depend on timing.

Shapes: ``b`` inputs (tokens, or decoder rows for a meta dictionary), ``d`` dimensions, ``n``
features. ``W_enc_T`` is the encoder stored feature by feature, (n, d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metasae_lib.train.kernels.decode import residual, residual_plain
from metasae_lib.train.kernels.inputs import (
    centre,
    centre_plain,
    normalise_rows,
    normalise_rows_plain,
)
from metasae_lib.train.kernels.select import (
    above_threshold,
    above_threshold_plain,
    batch_topk,
    batch_topk_plain,
    fired,
    fired_plain,
    row_topk,
    row_topk_plain,
)
from metasae_lib.train.kernels.update import (
    adam_step,
    near_threshold,
    near_threshold_plain,
    update_rows,
    update_rows_plain,
)


@dataclass(frozen=True)
class Kernels:
    """The loops of a training step in one of their two forms."""

    normalise_rows: Callable[..., tuple[Tensor, Tensor]]
    centre: Callable[..., Tensor]
    batch_topk: Callable[..., tuple[Any, int]]
    residual: Callable[..., tuple[Tensor, Tensor, Any]]
    fired: Callable[..., Tensor]
    row_topk: Callable[..., Tensor]
    update_rows: Callable[..., Tensor]
    above_threshold: Callable[..., Any]
    near_threshold: Callable[..., tuple[Tensor, Tensor]]


COMPILED = Kernels(
    normalise_rows, centre, batch_topk, residual, fired, row_topk, update_rows,
    above_threshold, near_threshold,
)  # fmt: skip
PLAIN = Kernels(
    normalise_rows_plain, centre_plain, batch_topk_plain, residual_plain, fired_plain,
    row_topk_plain, update_rows_plain, above_threshold_plain, near_threshold_plain,
)  # fmt: skip
