"""Token rows to residuals, in chunks; and residuals to shuffled batches.

A chunk is the residuals of `activations.chunk_rows` token rows. Those of held-out text, and with
`activations.cache` those of the training text, are computed once and kept on disk; others are
computed when asked for. The values are the same.
"""

from __future__ import annotations

import hashlib
import shutil
from bisect import bisect
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metasae_lib.study import (
    Artefact,
    ArtefactError,
    Role,
    Run,
    atomic_write,
    distributed,
    progress,
)
from metasae_lib.subject.corpus import load_tokens
from metasae_lib.subject.model import Subject, compute_device, fingerprint, subject_of

_VERSION = 1
_CHUNK = "{:05d}.npy"


class Residuals:
    """Residuals of a role's tokens: row after row, without position 0 under `text.skip_first`.

    The language model is loaded when a chunk has to be computed, never for a finished cache; pass
    `subject` to share one that is loaded. `inputs` is what the values depend on, for the keys of
    artefacts made from them.
    """

    def __init__(self, run: Run, role: Role, subject: Subject | None = None) -> None:
        profile = run.profile
        self.role = role
        self.device = compute_device(profile)
        self.inputs = {
            "tokens": (tokens := load_tokens(run)).hash(role),
            "skip_first": profile.text.skip_first,
            "chunk_rows": profile.activations.chunk_rows,
            # Not only a matter of speed: in bfloat16 a row's last bits depend on the batch's size.
            "batch_rows": profile.model.batch_rows,
            "model": fingerprint(profile),
        }
        self.n_tokens = tokens.n_tokens(role)
        self._run, self._profile = run, profile
        rows, size = tokens.rows(role), profile.activations.chunk_rows
        self._chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._given = subject
        self._kept = profile.activations.kept(role)
        if self._kept:  # a part of the run from here on, whoever has made it
            run.artefact("residuals", self.inputs, _VERSION)

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        shape = self._profile.shape
        return self._subject.d_model if shape is None else shape.d_model

    @property
    def n_chunks(self) -> int:
        """Chunks in one pass; the last may be shorter."""
        return len(self._chunks)

    def chunk_tokens(self, index: int) -> int:
        """Tokens of chunk `index`."""
        return len(self._chunks[index]) * self._profile.text.kept_per_row

    def chunk(self, index: int) -> Tensor:
        """Residuals (tokens, d) of chunk `index` in the model's dtype, on the run's device."""
        if not 0 <= index < self.n_chunks:
            raise IndexError(f"chunk {index} of {self.n_chunks}")
        if not self._kept:
            return self._computed_together(index)
        values = torch.from_numpy(np.load(self._folder / _CHUNK.format(index)))
        values = values.view(torch.bfloat16) if values.dtype == torch.int16 else values
        return values.to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.chunk(index) for index in range(self.n_chunks))

    @property
    def _subject(self) -> Subject:
        return self._given or subject_of(self._run)

    @cached_property
    def _folder(self) -> Path:
        """Where the chunks are kept, filled on first use."""
        made = self._run.made("residuals", {self.role: self.inputs}, _VERSION, self._fill_cache)
        return made[self.role].folder

    def _computed_together(self, index: int) -> Tensor:
        """A chunk of which each process of a launcher computes a part, in whole model batches."""
        rows, processes = self._chunks[index], distributed.world_size()
        batch, kept = self._profile.model.batch_rows, self._profile.text.kept_per_row
        share = -(-len(rows) // (batch * processes)) * batch
        parts = [slice(i * share, (i + 1) * share) for i in range(processes)]
        mine = self._compute(index, parts[distributed.rank()])
        return distributed.joined(mine, [len(rows[part]) * kept for part in parts])

    def _compute(self, index: int, part: slice = slice(None)) -> Tensor:
        rows = self._chunks[index][part]
        batch, dtype = self._profile.model.batch_rows, getattr(torch, self._profile.model.dtype)
        first = int(self._profile.text.skip_first)
        parts = [torch.empty(0, self.d, dtype=dtype, device=self.device)]
        subject = self._subject
        with progress(rows.size, f"residuals {self.role} {index + 1}/{self.n_chunks}") as bar:
            for start in range(0, len(rows), batch):
                ids = rows[start : start + batch]
                parts.append(subject.residuals(ids)[:, first:].flatten(0, 1))
                bar.update(ids.size)
        return torch.cat(parts)

    def _fill_cache(self, missing: dict[Role, Artefact]) -> None:
        """Compute what is missing. Chunks that a killed run left behind are whole, and kept.

        A chunk of the wrong size in an unfinished cache is computed again; in a finished one it is
        an `ArtefactError` that names the file.
        """
        artefact = missing[self.role]
        self._check_room(artefact.folder)
        for index in range(self.n_chunks):
            path = artefact.folder / _CHUNK.format(index)
            with suppress(OSError, ValueError):  # missing, or cut off
                if len(np.load(path, mmap_mode="r")) == self.chunk_tokens(index):
                    continue
            values = self._compute(index).cpu()
            # numpy has no bfloat16: its bits are kept as int16.
            bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
            with atomic_write(path) as temporary:
                np.save(temporary, bits.numpy())
        artefact.finish({"n_tokens": self.n_tokens})

    def _check_room(self, folder: Path) -> None:
        element = 2 if self._profile.model.dtype == "bfloat16" else 4
        there = sum(path.stat().st_size for path in folder.glob("*.npy"))
        needed = self.n_tokens * self.d * element - there
        if needed > (free := shutil.disk_usage(folder).free):
            raise ArtefactError(
                f"the residuals of role {self.role} take {needed / 1e9:.1f} GB more of disk and "
                f"{free / 1e9:.1f} are free at {folder.parent}: free some, or make "
                f"text.roles.{self.role} smaller"
            )

    def fill(self) -> None:
        """Fill the cache: from here on this role needs no language model."""
        _ = self._folder


class BatchStream:
    """Shuffled batches of training residuals, for ever; one stream serves every arm.

    A pass takes the chunks in their order and shuffles the tokens of each. A batch is a function
    of (step, order) alone, so training resumes at any step; batches run across the ends of chunks
    and passes. Steps in sequence load each chunk once, for all orders.
    """

    def __init__(self, run: Run, subject: Subject | None = None) -> None:
        self.residuals = Residuals(run, "train", subject)
        self.batch_tokens = run.profile.training.batch_tokens
        sizes = [self.residuals.chunk_tokens(i) for i in range(self.residuals.n_chunks)]
        self._starts = [0, *accumulate(sizes)]
        # The last chunk taken from, and the order of its tokens. A batch uses its chunks one after
        # the other, so that the one it ends in is the one that the next batch starts in.
        self._chunk: tuple[int, Tensor] | None = None
        self._orders: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def batch(self, step: int, order: int = 0) -> Tensor:
        """Raw residuals (b, d) of training step `step`, from 0; float32.

        order: seed of the order in which the tokens of a chunk are taken.
        """
        position = step * self.batch_tokens
        end = position + self.batch_tokens
        parts = []
        while position < end:
            turn, offset = divmod(position, self._starts[-1])
            index = bisect(self._starts, offset) - 1
            taken = min(end - position, self._starts[index + 1] - offset)
            offset -= self._starts[index]
            shuffled = self._shuffled(order, turn, index)
            parts.append(self._values(index)[shuffled[offset : offset + taken]])
            position += taken
        return torch.cat(parts).float()

    def _values(self, index: int) -> Tensor:
        if self._chunk is None or self._chunk[0] != index:
            self._chunk = None  # frees the old chunk before the new one is made
            self._chunk = index, self.residuals.chunk(index)
        return self._chunk[1]

    def _shuffled(self, order: int, turn: int, index: int) -> Tensor:
        """Order of the tokens of a chunk in pass `turn`."""
        last = self._orders.get(order)
        if last is None or last[0] != (turn, index):
            name = f"{order}/{turn}/{index}".encode()
            seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
            generator = torch.Generator().manual_seed(seed)
            places = torch.randperm(self.residuals.chunk_tokens(index), generator=generator)
            last = self._orders[order] = (turn, index), places.to(self.residuals.device)
        return last[1]
