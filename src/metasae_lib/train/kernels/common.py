"""What the kernels share: how loops are compiled, the lists of a batch, what an update takes.

numba's cache stays off: what it loads is optimised once more than what it has just compiled, and
differs in the last bits, so that a resumed training would not equal one that was never killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import get_num_threads, set_num_threads
from torch import Tensor

# Reassociation lets a dot product use vector lanes, contraction gives fused multiply-add. Both are
# fixed when the loop is compiled. The rest of "fastmath" stays off: NaN must remain NaN. Python's
# check for a division by zero would keep a loop from using vector lanes.
# numba's cache stays off: what it loads is optimised once more than what it has just compiled, and
# differs in the last bits, so that a resumed training would not equal one that was never killed.
_FLOAT = {"reassoc", "contract", "nsz"}
LOOP: dict[str, Any] = {
    "nogil": True,
    "fastmath": _FLOAT,
    "error_model": "numpy",
}
PARALLEL: dict[str, Any] = {**LOOP, "parallel": True}
ROWS = 32  # rows a thread takes at a time; also the fixed blocks of the encoder's b_dec gradient
_SERIAL = 1_000_000  # loops of fewer operations run on one thread: waking others costs more
TINY = 1e-30  # moments below this are zero: denormal numbers are slow


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


class Extra(NamedTuple):
    """A gradient that some rows of the dictionary receive besides that of the L2 loss."""

    position: Tensor  # (n,) int32: row of the matrices below that belongs to a feature, or -1
    W_dec: Tensor  # (m, d) float32: gradient of the decoder rows
    W_enc_T: Tensor  # (m, d) float32: gradient of the encoder
    pre: Tensor  # (m,) float32: gradient of the pre-activations, summed over the batch


class Pull(NamedTuple):
    """The penalty's gradient on decoder rows: ``scale[i] * direction[i]`` (Eq. 2-3)."""

    direction: Tensor  # (n, d) float32
    scale: Tensor  # (n,) float32


class Adam(NamedTuple):
    """One step of ``torch.optim.Adam`` (no weight decay); ``step`` counts from 1."""

    learning_rate: float
    beta1: float
    beta2: float
    step: int
    eps: float = 1e-8

    def rates(self) -> tuple[float, float]:
        """(learning rate / bias correction of m, 1 / sqrt of the bias correction of v)."""
        return (
            self.learning_rate / (1 - self.beta1**self.step),
            (1 - self.beta2**self.step) ** -0.5,
        )


@contextmanager
def threads_for(operations: int) -> Iterator[None]:
    """One thread for a small loop, as many as before otherwise."""
    before = get_num_threads()
    set_num_threads(1 if operations < _SERIAL else before)
    try:
        yield
    finally:
        set_num_threads(before)


def bit_patterns(values: Tensor) -> np.ndarray:
    """Positive floats are ordered as their bits are when read as integers."""
    as_int = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[values.dtype]
    return values.view(as_int).numpy()
