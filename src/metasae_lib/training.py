"""The alternating loop: every arm of a profile trained from one stream of residuals.

A step is written by hand: one dense product (the encoder), everything else only on the k·b
selected activations, see :mod:`metasae_lib.kernels`. Losses are means over tokens and dimensions in
the space of normalised inputs:

    L = mean (z - z_hat)² + w · mean (e - e_hat)² + λ₂ · mean_i p_i           (Eq. 3)

with z_hat the reconstruction, e = z - z_hat taken as a constant in the second term, e_hat what
the k_aux strongest dead features of each token make of it (AuxK, Gao et al. 2024; b_dec has no
part in e_hat), and p_i of Eq. 2. The second term reaches b_dec through the encoder, as the first.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metasae_lib import kernels
from metasae_lib.activations import BatchStream
from metasae_lib.corpus import load_tokens
from metasae_lib.dictionary import BatchTopK, normalise, scale_of
from metasae_lib.errors import TrainingError
from metasae_lib.kernels import Adam, Extra, Pull
from metasae_lib.penalty import decomposability, penalty_pull
from metasae_lib.profile import ArmSpec, Profile
from metasae_lib.progress import progress
from metasae_lib.run import Artefact, Run, atomic_write

VERSION = 1  # of the stage: raise it when the same inputs give other weights
HISTORY_EVERY = 10  # steps between two rows of an arm's history
_HISTORY = ("step", "tokens", "l2", "aux", "penalty", "l0", "dead", "meta_l2", "seconds")
_META_SEED = 1_000_003  # added to an arm's seed for its meta dictionary
_MEMORY_SHARE = 0.7  # of the free memory that training may plan with


@dataclass(frozen=True)
class Arm:
    """A trained arm. history: one row each :data:`HISTORY_EVERY` steps."""

    spec: ArmSpec
    sae: BatchTopK
    meta: BatchTopK | None
    history: pd.DataFrame
    folder: Path


@dataclass(frozen=True)
class Settings:
    """How one dictionary is trained; the names are those of the profile."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    dtype: torch.dtype = torch.bfloat16
    k_aux: int = 256
    aux_weight: float = 1 / 32
    dead_after: int = 5


@dataclass(frozen=True)
class Losses:
    """Of one step. l2 and aux: scalars (aux unweighted). l0: mean activations. dead: features."""

    l2: Tensor
    aux: Tensor
    l0: float
    dead: int


class Workspace:
    """Large matrices that are overwritten at every step, shared by the arms of a group."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[Any, ...], Tensor] = {}

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, columns) matrix of the type and on the device of `like`."""
        key = (rows, columns, like.dtype, like.device)
        if key not in self._matrices:
            self._matrices[key] = torch.empty(
                rows, columns, dtype=like.dtype, device=like.device
            )
        return self._matrices[key]


class Learner:
    """One BatchTopK dictionary with its optimiser, and one hand-written training step."""

    def __init__(
        self, sae: BatchTopK, settings: Settings, workspace: Workspace | None = None
    ) -> None:
        self.sae, self.settings = sae, settings
        self.kernels = kernels.COMPILED if sae.W_dec.device.type == "cpu" else kernels.PLAIN
        self.workspace = workspace or Workspace()
        self.W_enc_T = sae.W_enc.data.T
        self.W_dec, self.b_dec = sae.W_dec.data, sae.b_dec.data
        self.moments = tuple(torch.zeros_like(w) for w in 2 * [self.W_enc_T] + 2 * [self.W_dec])
        self.moments_b = torch.zeros_like(self.b_dec), torch.zeros_like(self.b_dec)
        self.silent = torch.zeros(sae.n_features, dtype=torch.int32, device=self.b_dec.device)
        self.step_count = 0
        self.bracket = 0
        self._low = self.W_enc_T.to(settings.dtype)

    def errors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Forward only: z - z_hat (b, d) and its squared norm (b,). z: (b, d) float32."""
        _, _, codes = self._encode(z)
        error, square, _ = self.kernels.residual(codes, z, self.W_dec, self.b_dec, False)
        return error, square

    def step(self, z: Tensor, pull: Pull | None = None) -> Losses:
        """One step of Adam on a batch. z: (b, d) float32, normalised. pull: on decoder rows.

        Nothing is changed when the loss is not finite (known at once on a CPU only).
        """
        b, d = z.shape
        centred, pre, codes = self._encode(z)
        error, square, dots = self.kernels.residual(codes, z, self.W_dec, self.b_dec, True)
        l2 = square.sum(dtype=torch.float64) / (b * d)
        if l2.device.type == "cpu" and not math.isfinite(l2.item()):
            return Losses(l2, l2, math.nan, 0)
        fired = self.kernels.fired(codes)
        self.silent = torch.where(fired, 0, self.silent + 1)
        dead = (self.silent >= self.settings.dead_after).nonzero()[:, 0]
        extra, aux = self._aux(pre, centred, error, dead)
        beta1, beta2 = self.settings.betas
        self.step_count += 1
        adam = Adam(self.settings.learning_rate, beta1, beta2, self.step_count)
        scale = -2 / (b * d)
        g_b = scale * error.sum(0)
        g_b += self.kernels.update_rows(
            self.W_enc_T, self.W_dec, self.moments, codes, dots, z, error, self.b_dec, scale,
            extra, pull, adam,
        )  # fmt: skip
        kernels.adam_step(self.b_dec, *self.moments_b, g_b, adam)
        if self._low is not self.W_enc_T:
            self._low.copy_(self.W_enc_T)
        return Losses(l2, aux, self.sae.k, dead.shape[0])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        names = ("m_enc", "v_enc", "m_dec", "v_dec")
        return {
            "W_enc_T": self.W_enc_T,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec,
            **dict(zip(names, self.moments, strict=True)),
            "m_b": self.moments_b[0],
            "v_b": self.moments_b[1],
            "silent": self.silent,
            "counters": torch.tensor([self.step_count, self.bracket]),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave. KeyError or RuntimeError if it does not fit."""
        for name, tensor in self.state().items():
            if name == "counters":
                self.step_count, self.bracket = state[name].tolist()
            else:
                tensor.copy_(state[name])
        self._low.copy_(self.W_enc_T)

    def _encode(self, z: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Centred inputs and pre-activations in the products' type, and the selected codes."""
        centred = (z - self.b_dec).to(self.settings.dtype)
        pre = self.workspace.matrix(z.shape[0], self.sae.n_features, self._low)
        torch.mm(centred, self._low.T, out=pre)
        codes, self.bracket = self.kernels.batch_topk(
            pre, self.sae.k * z.shape[0], self.bracket
        )
        return centred, pre, codes

    def _aux(
        self, pre: Tensor, centred: Tensor, error: Tensor, dead: Tensor
    ) -> tuple[Extra, Tensor]:
        """AuxK: gradient of w · mean (e - e_hat)² on the dead features' rows, and the mean.

        Dense products over the dead columns: k_aux is not small against them.
        """
        (b, d), n, m = error.shape, self.sae.n_features, dead.shape[0]
        position = torch.full((n,), -1, dtype=torch.int32, device=dead.device)
        if m == 0 or self.settings.aux_weight == 0:
            none = error.new_empty(0, d)
            return Extra(position, none, none, none[:, 0]), error.new_zeros(())
        position[dead] = torch.arange(m, dtype=torch.int32, device=dead.device)
        acts = self.kernels.row_topk(pre, dead, self.settings.k_aux)
        rows = self.W_dec[dead].to(acts.dtype)
        miss = (acts @ rows).to(error.dtype) - error
        loss = miss.square().mean()
        low = miss.to(acts.dtype)
        g_pre = (low @ rows.T).mul_(acts > 0)
        scale = 2 * self.settings.aux_weight / (b * d)
        extra = Extra(
            position,
            (acts.T @ low).to(error.dtype).mul_(scale),
            (g_pre.T @ centred).to(error.dtype).mul_(scale),
            g_pre.sum(0, dtype=error.dtype).mul_(scale),
        )
        return extra, loss


class Trainer:
    """One arm in training: the primary dictionary, its meta dictionary, counters, history."""

    def __init__(
        self,
        spec: ArmSpec,
        profile: Profile,
        d_in: int,
        device: torch.device,
        workspace: Workspace | None = None,
    ) -> None:
        sizes, training = profile.dictionary, profile.training
        self.spec, self.step_count = spec, 0
        self.n_primary, self.n_meta = training.n_primary_steps, training.n_meta_steps
        self.batch_tokens = training.batch_tokens
        settings = Settings(
            training.learning_rate,
            (training.betas[0], training.betas[1]),
            getattr(torch, training.dtype),
            training.k_aux,
            training.aux_weight,
            training.dead_after,
        )
        sae = BatchTopK(d_in, sizes.n_features, sizes.k, spec.seed).to(device)
        self.primary = Learner(sae, settings, workspace)
        self.meta: Learner | None = None
        if spec.kind in ("joint", "control"):
            meta = BatchTopK(d_in, sizes.n_meta_features, sizes.meta_k, spec.seed + _META_SEED)
            self.meta = Learner(
                meta.to(device),
                Settings(**{**vars(settings), "learning_rate": training.meta_learning_rate}),
                workspace,
            )
        self.rows: list[tuple[float, ...]] = []
        self.seconds = 0.0
        self._meta_l2 = math.nan

    def step(self, z: Tensor) -> Losses:
        """One primary step; a meta phase follows each n_p of them. z: (b, d) normalised.

        Raises TrainingError if the loss is not finite.
        """
        started = time.perf_counter()
        pull, penalty = (None, math.nan) if self.meta is None else self._pull()
        losses = self.primary.step(z, pull)
        self._check(losses, z)
        self.step_count += 1
        if self.meta is not None and self.step_count % self.n_primary == 0:
            rows = normalise(self.primary.W_dec)[0]
            for _ in range(self.n_meta):
                self._meta_l2 = self._check(self.meta.step(rows), rows).l2.item()
        self.seconds += time.perf_counter() - started
        if self.step_count % HISTORY_EVERY == 0:
            self.rows.append(
                (
                    self.step_count,
                    self.step_count * self.batch_tokens,
                    losses.l2.item(),
                    losses.aux.item(),
                    float(penalty),
                    losses.l0,
                    losses.dead,
                    self._meta_l2,
                    self.seconds,
                )
            )
        return losses

    def history(self) -> pd.DataFrame:
        """Step, tokens, l2, aux, penalty (mean p_i), l0, dead, meta_l2, seconds."""
        frame = pd.DataFrame(self.rows, columns=list(_HISTORY))
        return frame.astype({"step": int, "tokens": int, "dead": int})

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, and the history."""
        learners = {"primary": self.primary} | ({"meta": self.meta} if self.meta else {})
        tensors = {
            f"{name}.{key}": tensor
            for name, learner in learners.items()
            for key, tensor in learner.state().items()
        }
        history = torch.tensor(self.rows, dtype=torch.float64).view(-1, len(_HISTORY))
        return tensors | {
            "history": history,
            "progress": torch.tensor([self.step_count, self.seconds, self._meta_l2]).double(),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        for name, learner in (("primary", self.primary), ("meta", self.meta)):
            if learner is not None:
                start = f"{name}."
                learner.restore(
                    {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
                )
        self.rows = [tuple(row) for row in state["history"].tolist()]
        step, self.seconds, self._meta_l2 = state["progress"].tolist()
        self.step_count = int(step)

    def _pull(self) -> tuple[Pull, Tensor]:
        """Gradient of λ₂ · mean p_i on the decoder rows, and mean p_i; the meta is a constant.

        The meta dictionary rebuilds normalised rows; in decoder space its error is larger by what
        the row was divided by.
        """
        assert self.meta is not None and self.spec.sigma_sq is not None
        rows, _, std = normalise(self.primary.W_dec)
        error, square = self.meta.errors(rows)
        scale = scale_of(std)[:, 0]
        square = square * scale * scale
        factor = penalty_pull(square, self.spec.lambda2 or 0.0, self.spec.sigma_sq)
        return Pull(error, factor * scale), decomposability(square, self.spec.sigma_sq).mean()

    def _check(self, losses: Losses, inputs: Tensor) -> Losses:
        if losses.l2.device.type == "cpu" and not math.isfinite(losses.l2.item()):
            blame = (
                "the loss is not finite: lower the learning rate"
                if inputs.isfinite().all()
                else "the residuals of the batch hold NaN or infinite values"
            )
            raise TrainingError(
                f"arm {self.spec.name}, step {self.step_count + 1}, batch {self.step_count}: "
                f"{blame}"
            )
        return losses
