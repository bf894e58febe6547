"""One training step of one dictionary: selection, L2, AuxK, gradients by hand, Adam.

Losses are means over tokens and dimensions in the space of normalised inputs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metasae_lib.train import kernels
from metasae_lib.train.dictionary import Dictionary, JumpReLU
from metasae_lib.train.kernels.common import Adam, Batch, Extra, Pull, Rows, adam_step
from metasae_lib.train.replay import Replay, Workspace

_LAG = 2  # steps after which a GPU's count of dead features is read
_PAD = 64  # the list of dead features has a multiple of this length: a product is prepared by shape
_SMALL = 200_000_000  # multiply-adds of an encoder product that one thread does in a few ms


@dataclass(frozen=True)
class Settings:
    """How one dictionary is trained; the names are those of the profile."""

    learning_rate: float
    betas: Sequence[float] = (0.9, 0.99)
    dtype: torch.dtype = torch.bfloat16
    k_aux: int = 256
    aux_weight: float = 1 / 32
    dead_after: int = 5
    as_released: bool = False  # AuxK's residual is no constant; rows are made unit before the step
    jumprelu_bandwidth: float = 1e-3  # of the window, for inputs of norm 1
    jumprelu_weight: float = 1.0  # of (L0 / k - 1)²
    prefixes: Sequence[int] = ()  # of features, each to rebuild z alone; none: the whole dictionary


@dataclass(frozen=True)
class Losses:
    """Of one step. l2 and aux: scalars (aux unweighted). l0: mean activations. dead: features."""

    l2: Tensor
    aux: Tensor
    l0: float | Tensor
    dead: int | Tensor

    def clone(self) -> Losses:
        """The same, in memory of their own."""
        values = self.l2, self.aux, self.l0, self.dead
        return Losses(*(x.clone() if isinstance(x, Tensor) else x for x in values))  # type: ignore[arg-type]


class Learner:
    """One BatchTopK dictionary with its optimiser, and one hand-written training step.

    With `prefixes` it is a Matryoshka dictionary (Bussmann et al. 2025, Listing 1): features are
    selected once, over all, and the loss is the mean over prefixes of the L2 of what the selected
    features of a prefix rebuild alone. The paper has the sum, which Adam at one learning rate does
    not tell from the mean; the mean weighs against AuxK as the L2 of other arms does. The L2 that
    is reported, and the residual that AuxK rebuilds, are those of the whole dictionary.
    """

    def __init__(
        self, sae: Dictionary, settings: Settings, matrices: Workspace | None = None
    ) -> None:
        self.sae, self.settings = sae, settings
        self.kernels = kernels.compiled if sae.W_dec.device.type == "cpu" else kernels.plain
        self.workspace = matrices or Workspace()
        self.W_enc_T = sae.W_enc.data.T
        self.W_dec, self.b_dec = sae.W_dec.data, sae.b_dec.data
        weights = self.W_enc_T, self.W_dec
        self.rows = Rows(*weights, *(torch.zeros_like(w) for w in weights for _ in "mv"))
        self.moments_b = m, v = torch.zeros_like(self.b_dec), torch.zeros_like(self.b_dec)
        self.silent = torch.zeros(sae.n_features, dtype=torch.int32, device=self.b_dec.device)
        own = {"b_dec": self.b_dec, "m_b": m, "v_b": v, "silent": self.silent}
        self._kept: dict[str, Tensor] = self.rows._asdict() | own  # changed in place only
        self.step_count = 0
        self.bracket = 0
        self.ends = np.array(settings.prefixes or [sae.n_features])
        self._low = self.W_enc_T.to(settings.dtype)
        self._replay = Replay(self.workspace, self.b_dec.device)
        self._clock = torch.zeros((), device=self.b_dec.device)
        self._lag = max(1, min(_LAG, settings.dead_after - 1))
        self._soon_dead: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def errors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Forward only: z - z_hat (b, d) and its squared norm (b,). z: (b, d) float32."""
        codes = self._select(self._products(z)[1])
        error, square, _ = self._residual(codes, z, with_dots=False)
        return error[-1], square

    def step(self, z: Tensor, pull: Pull | None = None) -> Losses:
        """One step of Adam on a batch. z: (b, d) float32, normalised. pull: on decoder rows.

        Nothing is changed when the loss is not finite (known at once on a CPU only).
        """
        on_cpu = z.device.type == "cpu"
        room = None if on_cpu else self._room()

        def step(z: Tensor, *pull: Tensor) -> tuple[Losses, Tensor]:
            return self._step(z, Pull(*pull) if pull else None, room)

        losses, soon = self._replay(("step", room), step, z, *(pull or ()))
        if not on_cpu:
            self._hear(soon)
        if not on_cpu or math.isfinite(losses.l2):
            self.step_count += 1
        return losses.clone()

    def _step(self, z: Tensor, pull: Pull | None, room: int | None) -> tuple[Losses, Tensor]:
        """The losses, and how many features may be dead some steps later."""
        b, d = z.shape
        centred, pre = self._products(z)
        codes = self._select(pre)
        error, square, dots = self._residual(codes, z)
        l2 = square.sum(dtype=torch.float64) / (b * d)
        if l2.device.type == "cpu" and not math.isfinite(l2.item()):
            return Losses(l2, l2, math.nan, 0), l2
        self.silent.add_(1).masked_fill_(self.kernels.fired(codes), 0)
        dead, n_dead = self._dead(room)
        soon = l2 if room is None else (self.silent >= self.settings.dead_after - self._lag).sum()
        extra, aux, e_hat = self._aux(pre, centred, error[-1], dead)
        if self.settings.as_released:
            # The residual that AuxK rebuilds depends on z_hat as well: d(e - e_hat)²/dz_hat.
            target = (
                z if e_hat is None
                else z - self.settings.aux_weight * (e_hat.to(z.dtype) - error[-1])
            )  # fmt: skip
            error, _, dots = self._residual(codes, target)
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        beta1, beta2 = self.settings.betas
        adam = Adam(self.settings.learning_rate, beta1, beta2, self._number())
        scale = -2 / (len(error) * b * d)
        l0 = self._fit_thresholds(pre, codes, error[-1], scale, adam)
        g_b = scale * error[0].sum(0)
        batch = Batch(codes, dots, z, error, self.ends, self.b_dec, scale)
        unit = not self.settings.as_released
        g_b += self.kernels.update_rows(self.rows, self._low, batch, extra, pull, adam, unit)
        adam_step(self.b_dec, *self.moments_b, g_b, adam)
        return Losses(l2, aux, l0, n_dead), soon

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        return self._kept | {"counters": torch.tensor([self.step_count, self.bracket])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave. KeyError or RuntimeError if it does not fit."""
        self.step_count, self.bracket = state["counters"].tolist()
        for name, tensor in self._kept.items():
            tensor.copy_(state[name])
        self._low.copy_(self.W_enc_T)
        self._clock.fill_(self.step_count)
        self._soon_dead.clear()

    def _products(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Centred inputs (b, d) and pre-activations (b, n) in the products' type."""
        centred = self.kernels.centre(z, self.b_dec, self.settings.dtype)
        shape, dtype = (len(z), self.sae.n_features), self._low.dtype
        pre = self.workspace(shape, dtype=dtype, device=self._low.device)
        return centred, torch.mm(centred, self._low.T, out=pre)

    def _select(self, pre: Tensor) -> Any:
        """The codes of a batch: its k·b largest pre-activations."""
        codes, self.bracket = self.kernels.batch_topk(pre, self.sae.k * len(pre), self.bracket)
        return codes

    def _residual(self, codes: Any, z: Tensor, with_dots: bool = True) -> Any:
        return self.kernels.residual(codes, z, self.W_dec, self.b_dec, self.ends, with_dots)

    def _fit_thresholds(
        self, pre: Tensor, codes: Any, error: Tensor, scale: float, adam: Adam
    ) -> float | Tensor:
        """Learn what decides which activations are kept, if anything does. Returns L0."""
        return self.sae.k

    def _number(self) -> int | Tensor:
        """Which step this is, from 1; a GPU counts for itself."""
        return self.step_count + 1 if self._clock.device.type == "cpu" else self._clock.add_(1)

    def _dead(self, room: int | None) -> tuple[Tensor, int | Tensor]:
        """The dead features, padded with -1 to `room` places, and how many they are."""
        dead = self.silent >= self.settings.dead_after
        count: int | Tensor = dead.sum()
        if room is None:
            count = int(count)
            room = min(-(-count // _PAD) * _PAD, len(dead))
        return torch.nonzero_static(dead, size=room, fill_value=-1)[:, 0], count

    def _room(self) -> int:
        """Places for the dead features of the next step, without waiting for the one before.

        A feature that is dead then was silent for nearly as long a few steps ago: what was counted
        there has reached the host. Of few different sizes, since each has a graph of its own.
        """
        if len(self._soon_dead) < self._lag:  # the first steps
            bound = int((self.silent >= self.settings.dead_after - 1).sum())
        else:
            count, event = self._soon_dead.popleft()
            event.synchronize()
            bound = int(count)
        unit = max(_PAD, 1 << max(bound.bit_length() - 3, 0))
        return min(-(-bound // unit) * unit, len(self.silent))

    def _hear(self, soon: Tensor) -> None:
        """Let a count come to the host while the GPU goes on."""
        self._soon_dead.append((soon.to("cpu", non_blocking=True), event := torch.cuda.Event()))
        event.record()

    def _aux(
        self, pre: Tensor, centred: Tensor, error: Tensor, dead: Tensor
    ) -> tuple[Extra, Tensor, Tensor | None]:
        """AuxK: gradient of w · mean (e - e_hat)² on the dead features' rows, the mean, e_hat.

        Dense products over the dead columns: k_aux is not small against them.
        """
        b, d = error.shape
        if len(dead) == 0 or self.settings.aux_weight == 0:
            none = error.new_empty(0, d)
            return Extra(dead[:0], none, none, none[:, 0]), error.new_zeros(()), None
        acts = self.kernels.row_topk(pre, dead, self.settings.k_aux)
        rows = self.W_dec[dead].to(acts.dtype)
        e_hat = acts @ rows
        low, loss = self.kernels.missed(e_hat, error)
        g_pre = low @ rows.T
        g_bias = self.kernels.where_kept(g_pre, acts)
        scale = 2 * self.settings.aux_weight / (b * d)
        extra = Extra(
            dead,
            (acts.T @ low).to(error.dtype).mul_(scale),
            (g_pre.T @ centred).to(error.dtype).mul_(scale),
            g_bias.mul_(scale),
        )
        return extra, loss, e_hat


class JumpReLULearner(Learner):
    """One JumpReLU dictionary (Rajamanoharan et al. 2024), trained to a mean L0 of k.

    The loss has a term w (L0 / k - 1)². A step of height has no gradient, so the thresholds θ get
    that of a rectangle of width ε around them:

        da/dθ = -θ/ε,  dL0/dθ = -1/ε   where |pre - θ| < ε/2

    ε, and the rate at which θ moves, are those of the authors for inputs of norm 1; ours have norm
    sqrt(d), so both are multiplied by it. The thresholds start at the batch cut-off that BatchTopK
    has on the first batch.
    """

    sae: JumpReLU

    def __init__(
        self, sae: JumpReLU, settings: Settings, matrices: Workspace | None = None
    ) -> None:
        super().__init__(sae, settings, matrices)
        self.moments_t = m, v = torch.zeros_like(sae.threshold), torch.zeros_like(sae.threshold)
        self._kept |= {"threshold": sae.threshold, "m_t": m, "v_t": v}
        self.width = settings.jumprelu_bandwidth * math.sqrt(sae.d_in)

    def _select(self, pre: Tensor) -> Any:
        if self.step_count == 0:
            acts = torch.as_tensor(super()._select(pre).acts)
            cut = torch.where(acts > 0, acts, math.inf).amin()
            self.sae.threshold.copy_(cut.clamp(min=self.width / 2).expand_as(self.sae.threshold))
        return self.kernels.above_threshold(pre, self.sae.threshold)

    def _fit_thresholds(
        self, pre: Tensor, codes: Any, error: Tensor, scale: float, adam: Adam
    ) -> float | Tensor:
        theta, b, d = self.sae.threshold, *error.shape
        dots, counts = self.kernels.near_threshold(pre, theta, self.width / 2, error, self.W_dec)
        l0 = (torch.as_tensor(codes.acts) > 0).sum() / b
        slope = 2 * self.settings.jumprelu_weight * (l0 / self.sae.k - 1) / (self.sae.k * b)
        gradient = (theta * scale * dots + slope * counts) / -self.width
        scaled = adam._replace(learning_rate=adam.learning_rate * math.sqrt(d))
        adam_step(theta, *self.moments_t, gradient * math.sqrt(d), scaled)
        theta.clamp_(min=self.width / 2)  # so that the window has no negative part
        return l0


@contextmanager
def one_thread_if_small(products: int) -> Iterator[None]:
    """A step of few multiply-adds has many short loops: each would wait for other threads."""
    before = torch.get_num_threads()
    if products < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
