"""Passes over a role: tokens part by part as each arm reads them, and its pre-activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from metasae_lib.study import MeasureError, Run, progress
from metasae_lib.study.plan import MEMORY_SHARE
from metasae_lib.subject import Residuals
from metasae_lib.subject.model import free_memory
from metasae_lib.train import Arm, Dictionary
from metasae_lib.train.dictionary import Space, enter

GROUP = 8192  # tokens whose pre-activations are made at once
T = TypeVar("T")


class Entered:
    """Residuals x (t, d) of some tokens, entered once into each space that an arm works in."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.float()
        self._entered: dict[Space, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._x)

    @property
    def z(self) -> Tensor:
        """(t, d) normalised: what dictionaries that were trained here read."""
        return self._in("layer_norm")[0]

    def of(self, sae: Dictionary) -> Tensor:
        """(t, d) as a dictionary reads them."""
        return self._in(sae.space)[0]

    def unit(self, sae: Dictionary) -> Tensor:
        """(t,): how long in z what has length 1 in the dictionary's space is."""
        return (self._in(sae.space)[2] / self._in("layer_norm")[2])[:, 0]

    def _in(self, space: Space) -> tuple[Tensor, Tensor, Tensor]:
        if space not in self._entered:
            self._entered[space] = enter(self._x, space)
        return self._entered[space]


def by_arm(arms: Mapping[str, Arm], inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an artefact of each arm depends on, for `Run.made`: the arm's own, and `inputs`."""
    return {name: {"arm": arm.folder.name, **inputs} for name, arm in arms.items()}


def counts_bytes(arms: Mapping[str, Arm]) -> int:
    """Bytes of the int32 counts of the pairs of one arm, the widest of some."""
    return 4 * max(arm.sae.n_features for arm in arms.values()) ** 2


def in_memory(names: Sequence[T], size: int, what: str, device: torch.device) -> Iterator[list[T]]:
    """The names in groups whose counts fit in memory together, in order.

    size: bytes that each takes. what: each of them, for the MeasureError if one alone does not fit.
    """
    free = free_memory(device)
    at_once = int(MEMORY_SHARE * free // size)
    if not at_once:
        raise MeasureError(
            f"{what} take {size / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free: have "
            f"{size / MEMORY_SHARE / 1e9:.0f} GB free, or halve dictionary.n_features"
        )
    for start in range(0, len(names), at_once):
        yield list(names[start : start + at_once])


def pre_activations(sae: Dictionary, z: Tensor, dtype: torch.dtype) -> Tensor:
    """(z - b_dec) W_enc with the matrix product in `dtype`, as in training.

    z: (b, d) normalised. Returns (b, n) in `dtype`. Calibration, scan and fidelity all take this
    one, so that a threshold is compared with numbers that were rounded as those it was made from. A
    dictionary that was trained elsewhere is read in float32.
    """
    if sae.b_enc is not None:
        return sae.pre_activations(z)
    return (z - sae.b_dec).to(dtype) @ sae.W_enc.to(dtype)


def product_dtype(run: Run) -> torch.dtype:
    """The type of the profile's matrix products."""
    dtype: torch.dtype = getattr(torch, run.profile.training.dtype)
    return dtype


def training_batches(chunk: Tensor, batch_tokens: int, seed: int) -> Iterator[Tensor]:
    """Batches (b, d) of about `batch_tokens` residuals, float32, out of a chunk (t, d).

    Tokens are shuffled within the chunk, as in training: the neighbours in a text fire alike, and
    the cut-offs of unshuffled batches would vary more than those that the dictionary was made for.
    """
    order = torch.randperm(len(chunk), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(max(1, round(len(chunk) / batch_tokens))):
        yield chunk[rows.to(chunk.device)].float()


def training_groups(
    run: Run, residuals: Residuals, n_tokens: int, what: str
) -> Iterator[tuple[Entered, list[int]]]:
    """`training_batches` of the first chunks of a role, until `n_tokens` tokens are there.

    Batches are joined into groups of about GROUP tokens, for one large product each. Yields the
    group and the sizes of its batches. what: beside the progress bar.
    """
    taken = 0
    with progress(n_tokens, what) as bar:
        for i in range(residuals.n_chunks):
            if taken >= n_tokens:
                return
            batches = training_batches(residuals.chunk(i), run.profile.training.batch_tokens, i)
            for group in _grouped(batches):
                tokens = Entered(torch.cat(group))
                yield tokens, list(map(len, group))
                taken += len(tokens)
                bar.update(len(tokens))


def _grouped(batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for batch in batches:
        group.append(batch)
        if sum(map(len, group)) >= GROUP:
            yield group
            group = []
    if group:
        yield group


def scan_chunks(
    residuals: Residuals, what: str, first: int = 0
) -> Iterator[tuple[int, Iterator[Entered]]]:
    """The chunks of a role from one on: number, and tokens part by part.

    what: beside the progress bar.
    """
    with progress(residuals.n_tokens, what) as bar:

        def parts(chunk: Tensor) -> Iterator[Entered]:
            for x in chunk.split(GROUP):
                yield Entered(x)
                bar.update(len(x))

        for i in range(first, residuals.n_chunks):
            yield i, parts(residuals.chunk(i))
