"""The kernels on a CPU: tensors go in as arrays of the same memory, selections are lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, set_num_threads
from torch import Tensor

from metasae_lib.train.kernels import loops, plain
from metasae_lib.train.kernels.common import Adam, Batch, Codes, Extra, Pull, Rows

_SERIAL = 1_000_000  # loops of fewer operations run on one thread: waking others costs more


def _run(loop: Callable[..., None], operations: int, *arguments: Any) -> None:
    """Run a loop, on one thread if it is small."""
    before = get_num_threads()
    set_num_threads(1 if operations < _SERIAL else before)
    try:
        loop(*map(_as_arrays, arguments))
    finally:
        set_num_threads(before)


def _as_arrays(value: Any) -> Any:
    if hasattr(value, "_make"):  # a named tuple
        return value._make(map(_as_arrays, value))
    return value.numpy() if isinstance(value, Tensor) else value


def bits_of(values: Tensor) -> Tensor:
    """Positive floats are ordered as their bits are when read as integers."""
    return values.view({torch.bfloat16: torch.int16, torch.float32: torch.int32}[values.dtype])


def normalise_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each row less its mean, over its (unbiased) standard deviation + eps.

    x: (b, d) float32, contiguous. Returns z (b, d) and what each row was divided by, (b,).
    """
    z, scale = torch.empty_like(x), torch.empty(len(x))
    _run(loops.normalise_rows, x.numel(), x, eps, z, scale)
    return z, scale


def centre(z: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """``z - b_dec`` in the products' type, in one pass. z: (b, d) float32, b_dec: (d,)."""
    if dtype != torch.bfloat16:
        return plain.centre(z, b_dec, dtype)
    out = torch.empty_like(z, dtype=dtype)
    _run(loops.centre, z.numel(), z, b_dec, bits_of(out))
    return out


def batch_topk(pre: Tensor, k: int, bracket: int = 0) -> tuple[Codes, int]:
    """The ``k`` largest positive values of the whole matrix, ties by lowest flat index.

    Values a little below the last cut-off are listed as candidates and the exact cut-off is found
    among them; should fewer than ``k`` be there, the cut-off is bisected over the whole matrix.
    The result is the same either way.

    pre: (b, n) bfloat16 or float32, contiguous. k: entries to keep in all.
    bracket: what the last call returned, 0 at first. Returns the codes and the next bracket.
    """
    patterns, low = bits_of(pre), max(bracket, 1)
    top = torch.iinfo(patterns.dtype).max
    bounds = patterns.new_full((pre.shape[1],), low)
    start = _starts(patterns, bounds)
    if not k <= start[-1] <= 4 * k:
        low, _ = loops.kth_largest(patterns.flatten().numpy(), k, 1, top)
        start = _starts(patterns, bounds.fill_(low))
    cols, found = _gathered(patterns, bounds, start)
    cut, above = loops.kth_largest(found, k, low, top)
    row_ptr = np.empty_like(start)
    loops.keep(found, cols, start, cut, k - above, row_ptr)
    m = row_ptr[-1]
    codes = _codes(row_ptr, cols[:m], found[:m], pre)
    # One octave of values is 2^7 patterns of a bfloat16 and 2^23 of a float32: about 4% below.
    margin = 6 if pre.dtype == torch.bfloat16 else 6 << 16
    return codes, max(cut - margin, 1)


def above_threshold(pre: Tensor, threshold: Tensor) -> Codes:
    """The pre-activations above their feature's threshold (JumpReLU).

    pre: (b, n) bfloat16 or float32, contiguous. threshold: (n,) float32, at least 0.
    """
    patterns, bounds = bits_of(pre), least_above(threshold, pre.dtype)
    start = _starts(patterns, bounds)
    return _codes(start, *_gathered(patterns, bounds, start), pre)


def least_above(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The least pattern of a type above each value, which must not be negative."""
    bits = bits_of(values)
    # A bfloat16 is the upper half of a float32.
    return (bits >> 16).short() + 1 if dtype == torch.bfloat16 else bits + 1


def _starts(patterns: Tensor, bounds: Tensor) -> np.ndarray:
    """Where each row begins in a list of the entries that reach their column's bound."""
    counts = np.empty(len(patterns), np.int64)
    _run(loops.count, patterns.numel(), patterns, bounds, counts)
    return np.concatenate([[0], np.cumsum(counts)])


def _gathered(patterns: Tensor, bounds: Tensor, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and pattern of those entries."""
    cols, found = np.empty(start[-1], np.int32), patterns.new_empty(start[-1]).numpy()
    _run(loops.gather, patterns.numel(), patterns, bounds, start, cols, found)
    return cols, found


def _codes(row_ptr: np.ndarray, cols: np.ndarray, found: np.ndarray, pre: Tensor) -> Codes:
    """Both lists of the entries kept, from the token-major one."""
    acts = torch.from_numpy(found).view(pre.dtype).float().numpy()
    col_ptr = np.empty(pre.shape[1] + 2, np.int64)
    entries, rows = np.empty_like(cols), np.empty_like(cols)
    loops.by_feature(row_ptr, cols, col_ptr, entries, rows)
    return Codes(row_ptr, cols, acts, col_ptr[:-1], entries, rows)


def fired(codes: Codes) -> Tensor:
    """Which features have a selected activation, (n,) bool."""
    return torch.from_numpy(np.diff(codes.col_ptr) > 0)


def row_topk(pre: Tensor, features: Tensor, k: int) -> Tensor:
    """The ``k`` largest positive pre-activations of each input among some features.

    pre: (b, n) bfloat16 or float32. features: (m,) int64; -1 is none, its column zero. Returns
    (b, m) of the same type, zero where not kept; ties by lowest index.
    """
    out = pre.new_empty(len(pre), len(features))
    _run(loops.row_topk, out.numel() * 8, bits_of(pre), features, k, bits_of(out))
    return out


def missed(e_hat: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """``e_hat - error`` in the products' type, and the mean of its square before it is rounded.

    e_hat: (b, d) in that type. error: (b, d) float32.
    """
    if e_hat.dtype != torch.bfloat16:
        return plain.missed(e_hat, error)
    low, square = torch.empty_like(e_hat), torch.empty(len(error))
    _run(loops.missed, error.numel(), bits_of(e_hat), error, bits_of(low), square)
    return low, square.sum() / error.numel()


def where_kept(g: Tensor, acts: Tensor) -> Tensor:
    """Make a gradient zero, in place, where a feature was not kept; its sums over inputs (m,).

    g, acts: (b, m) in the products' type, acts not negative. The sums are float32.
    """
    if g.dtype != torch.bfloat16:
        return plain.where_kept(g, acts)
    sums = torch.empty(-(-len(g) // loops.ROWS), g.shape[1])
    _run(loops.where_kept, g.numel(), bits_of(g), bits_of(acts), sums)
    return sums.sum(0)


def residual(
    codes: Codes, z: Tensor, W_dec: Tensor, b_dec: Tensor, ends: np.ndarray, with_dots: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    """What each prefix of the dictionary leaves, ``e_j = z - (acts[:, :j] @ W_dec[:j] + b_dec)``.

    A feature of group g is in prefix g and in all that follow, so it feels the sum of what they
    leave; those of the last group feel what the whole dictionary leaves.

    z: (b, d) float32. ends: (p,) int64, ascending: features of each prefix, the last all n. Returns
    those sums (p, b, d), the squared norm of the last (b,), and for each entry the product of the
    error that its feature feels with its decoder row, (m,) in token-major order (empty unless asked
    for).
    """
    m = len(codes.cols)
    error, square = z.new_empty(len(ends), *z.shape), torch.empty(len(z))
    dots = np.empty(m if with_dots else 0, np.float32)
    operations = (m + len(z)) * z.shape[1]
    _run(loops.residual, operations, codes, z, W_dec, b_dec, ends, error, square, dots)
    return error, square, dots


def update_rows(
    weights: Rows,
    low: Tensor,
    batch: Batch,
    extra: Extra,
    pull: Pull | None,
    adam: Adam,
    unit: bool = True,
) -> Tensor:
    """Gradient, Adam step and unit rows of every feature, in place, one row at a time.

    With ``c = scale``, activations ``a`` and products ``q`` of :func:`residual`::

        dL/dW_dec[j]    = c * sum_t a[t,j] error[g(j),t]       (+ extra, + pull)
        dL/dpre[t,j]    = c * q[t,j]
        dL/dW_enc[:, j] = sum_t dL/dpre[t,j] (z[t] - b_dec)     (+ extra)

    The component of the decoder's gradient along its row is removed before the step and the row
    is made a unit vector after it (if `unit`). No (n, d) gradient exists at any time.

    low: (n, d) takes the new W_enc_T in the products' type; it may be W_enc_T itself.
    Returns the gradient that reaches b_dec through the encoder,
    ``-sum_j (sum_t dL/dpre[t,j]) W_enc[:, j]``, (d,).
    """
    n, d = weights.W_dec.shape
    partial = np.empty((-(-n // loops.ROWS), d), np.float32)
    none = Pull(weights.W_dec[:0], weights.W_dec[:0, 0])
    rates = (*adam.rates(), adam.beta1, adam.beta2, adam.eps)
    operations = (n + len(batch.codes.cols)) * d
    bits = bits_of(
        low if low.dtype == torch.bfloat16 else low.new_empty(0, 0, dtype=torch.bfloat16)
    )
    # The last place takes what pads the list of features.
    position = torch.full((n + 1,), -1, dtype=torch.int32)
    position[extra.features] = torch.arange(len(extra.features), dtype=torch.int32)
    placed = tuple(map(_as_arrays, (position[:n], *extra[1:])))
    arguments = weights, batch, placed, pull or none, rates, unit, bits, partial
    _run(loops.update_rows, operations, *arguments)
    return torch.from_numpy(partial.sum(0))


def near_threshold(
    pre: Tensor, threshold: Tensor, reach: float, error: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """What a threshold's gradient is made of, from entries within `reach` of it.

    pre: (b, n). threshold: (n,), at least `reach`. error: (b, d). W_dec: (n, d). Returns for each
    feature the sum of error · row over the entries with threshold - reach < pre <=
    threshold + reach, and their number, both (n,) float32.
    """
    dots, counts = torch.zeros_like(threshold), torch.zeros_like(threshold)
    low, high = (least_above(x, pre.dtype) for x in (threshold - reach, threshold + reach))
    _run(loops.near_threshold, pre.numel(), bits_of(pre), low, high, error, W_dec, dots, counts)
    return dots, counts
