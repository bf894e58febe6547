"""What both forms of the kernels take and give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Codes(NamedTuple):
    """The selected activations of a batch, listed by token and by feature."""

    row_ptr: np.ndarray  # (b+1,) int64: the entries of token t are row_ptr[t]:row_ptr[t+1]
    cols: np.ndarray  # (m,) int32: feature of each entry, ascending within a token
    acts: np.ndarray  # (m,) float32: its activation, > 0
    col_ptr: np.ndarray  # (n+1,) int64: the entries of feature j in `entries`
    entries: np.ndarray  # (m,) int32: position in the token-major lists, tokens ascending
    rows: np.ndarray  # (m,) int32: token of each feature-major entry


class DenseCodes(NamedTuple):
    """The selected activations as a dense matrix (the plain form of :class:`Codes`)."""

    acts: Tensor  # (b, n), zero where not selected


class Rows(NamedTuple):
    """What a step updates feature by feature: weights and Adam's moments, each (n, d) float32."""

    W_enc_T: Tensor
    W_dec: Tensor
    m_enc: Tensor
    v_enc: Tensor
    m_dec: Tensor
    v_dec: Tensor


def groups(ends: np.ndarray) -> list[slice]:
    """The features that each prefix of a dictionary has beyond the one before."""
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


class Batch(NamedTuple):
    """A batch, what was selected of it, and what the dictionary leaves."""

    codes: Any  # Codes or DenseCodes
    dots: Any  # product of each activation's error and decoder row, see `residual`
    z: Tensor  # (b, d) float32: the inputs
    error: Tensor  # (p, b, d) float32: what the features of each group feel, see `residual`
    ends: np.ndarray  # (p,) int64: where the groups end
    b_dec: Tensor  # (d,) float32, before the step
    scale: float  # the derivative of the L2 loss is scale * error


class Extra(NamedTuple):
    """A gradient that some rows of the dictionary receive besides that of the L2 loss."""

    features: Tensor  # (m,) int64: whose rows they are, or -1 for none, whose gradient is zero
    W_dec: Tensor  # (m, d) float32: gradient of the decoder rows
    W_enc_T: Tensor  # (m, d) float32: gradient of the encoder
    pre: Tensor  # (m,) float32: gradient of the pre-activations, summed over the batch


class Pull(NamedTuple):
    """The penalty's gradient on decoder rows: ``scale[i] * direction[i]`` (Eq. 2-3)."""

    direction: Tensor  # (n, d) float32
    scale: Tensor  # (n,) float32


class Adam(NamedTuple):
    """One step of ``torch.optim.Adam`` (no weight decay); ``step`` counts from 1.

    On a GPU it is a tensor there, so that a step that is recorded once can be any step.
    """

    learning_rate: float
    beta1: float
    beta2: float
    step: int | Tensor
    eps: float = 1e-8

    def rates(self) -> tuple[Any, Any]:
        """(learning rate / bias correction of m, 1 / sqrt of the bias correction of v)."""
        return (
            self.learning_rate / (1 - self.beta1**self.step),
            (1 - self.beta2**self.step) ** -0.5,
        )


def adam_step(w: Tensor, m: Tensor, v: Tensor, g: Tensor, adam: Adam) -> None:
    """``torch.optim.Adam`` on one tensor, in place."""
    rate, root = adam.rates()
    m.lerp_(g, 1 - adam.beta1)
    v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    scale = (v.sqrt() * root).add_(adam.eps)
    if isinstance(rate, Tensor):
        w.sub_(m / scale * rate)
    else:
        w.addcdiv_(m, scale, value=-rate)
