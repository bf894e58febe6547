"""The alternating loop: every arm of a profile trained from one stream of residuals.

A step is written by hand: one dense product (the encoder), everything else only on the k·b
selected activations, see :mod:`metasae_lib.kernels`. Losses are means over tokens and dimensions in
the space of normalised inputs:

    L = mean (z - z_hat)² + w · mean (e - e_hat)² + λ₂ · mean_i p_i           (Eq. 3)

with z_hat the reconstruction, e = z - z_hat taken as a constant in the second term, e_hat what
the k_aux strongest dead features of each token make of it (AuxK, Gao et al. 2024; b_dec has no
part in e_hat), and p_i of Eq. 2. The second term reaches b_dec through the encoder, as the first.

Under a distributed launcher (``torchrun``) the arms are dealt out to the processes, one a GPU; the
residuals of a chunk are computed in parts and shared. The weights are the same.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metasae_lib import distributed, kernels
from metasae_lib.activations import BatchStream, Residuals
from metasae_lib.dictionary import EPS, BatchTopK, Dictionary, JumpReLU, normalise
from metasae_lib.errors import TrainingError
from metasae_lib.kernels import Adam, Extra, Pull
from metasae_lib.penalty import decomposability, orthogonality, penalty_pull
from metasae_lib.profile import ArmSpec, Profile
from metasae_lib.progress import progress
from metasae_lib.run import Artefact, Run, atomic_write, locked
from metasae_lib.subject import compute_device

VERSION = 2  # of the stage: raise it when the same inputs give other weights
HISTORY_EVERY = 10  # steps between two rows of an arm's history
_HISTORY = ("step", "tokens", "l2", "aux", "penalty", "l0", "dead", "meta_l2", "seconds")
_META_SEED = 1_000_003  # added to an arm's seed for its meta dictionary
_MEMORY_SHARE = 0.7  # of the free memory that training may plan with
_LAG = 2  # steps after which a GPU's count of dead features is read
_PAD = 64  # a GPU's list of dead features has a multiple of this length: few shapes
_SMALL = 200_000_000  # multiply-adds of an encoder product that one thread does in a few ms
_CHECKPOINT = re.compile(r"(?:final|checkpoint)-(\d+)\.safetensors")


@dataclass(frozen=True)
class Arm:
    """A trained arm. history: one row each :data:`HISTORY_EVERY` steps."""

    spec: ArmSpec
    sae: Dictionary
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
    as_released: bool = False  # AuxK's residual is no constant; rows are made unit before the step
    bandwidth: float = 1e-3  # of JumpReLU's window, for inputs of norm 1
    sparsity_weight: float = 1.0  # of JumpReLU's (L0 / k - 1)²


@dataclass(frozen=True)
class Losses:
    """Of one step. l2 and aux: scalars (aux unweighted). l0: mean activations. dead: features."""

    l2: Tensor
    aux: Tensor
    l0: float | Tensor
    dead: int | Tensor


class Workspace:
    """Large matrices that are overwritten at every step, shared by the arms of a group."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[Any, ...], Tensor] = {}

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, columns) matrix of the type and on the device of `like`."""
        key = (rows, columns, like.dtype, like.device)
        if key not in self._matrices:
            self._matrices[key] = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
        return self._matrices[key]


class Learner:
    """One BatchTopK dictionary with its optimiser, and one hand-written training step."""

    def __init__(
        self, sae: Dictionary, settings: Settings, workspace: Workspace | None = None
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
        self._soon_dead: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def errors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Forward only: z - z_hat (b, d) and its squared norm (b,). z: (b, d) float32."""
        codes = self._select(self._products(z)[1])
        error, square, _ = self.kernels.residual(codes, z, self.W_dec, self.b_dec, False)
        return error, square

    def step(self, z: Tensor, pull: Pull | None = None) -> Losses:
        """One step of Adam on a batch. z: (b, d) float32, normalised. pull: on decoder rows.

        Nothing is changed when the loss is not finite (known at once on a CPU only).
        """
        b, d = z.shape
        centred, pre = self._products(z)
        codes = self._select(pre)
        error, square, dots = self.kernels.residual(codes, z, self.W_dec, self.b_dec, True)
        l2 = square.sum(dtype=torch.float64) / (b * d)
        if l2.device.type == "cpu" and not math.isfinite(l2.item()):
            return Losses(l2, l2, math.nan, 0)
        fired = self.kernels.fired(codes)
        self.silent = torch.where(fired, 0, self.silent + 1)
        dead, n_dead = self._dead()
        extra, aux, miss = self._aux(pre, centred, error, dead)
        if self.settings.as_released:
            # The residual that AuxK rebuilds depends on z_hat as well: d(e - e_hat)²/dz_hat.
            target = z if miss is None else z - self.settings.aux_weight * miss
            error, _, dots = self.kernels.residual(codes, target, self.W_dec, self.b_dec, True)
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        beta1, beta2 = self.settings.betas
        self.step_count += 1
        adam = Adam(self.settings.learning_rate, beta1, beta2, self.step_count)
        scale = -2 / (b * d)
        l0 = self._fit_thresholds(pre, codes, error, scale, adam)
        g_b = scale * error.sum(0)
        g_b += self.kernels.update_rows(
            self.W_enc_T, self._low, self.W_dec, self.moments, codes, dots, z, error, self.b_dec,
            scale, extra, pull, adam, not self.settings.as_released,
        )  # fmt: skip
        kernels.adam_step(self.b_dec, *self.moments_b, g_b, adam)
        return Losses(l2, aux, l0, n_dead)

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
        self._soon_dead.clear()

    def _products(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Centred inputs (b, d) and pre-activations (b, n) in the products' type."""
        centred = self.kernels.centre(z, self.b_dec, self.settings.dtype)
        pre = self.workspace.matrix(z.shape[0], self.sae.n_features, self._low)
        return centred, torch.mm(centred, self._low.T, out=pre)

    def _select(self, pre: Tensor) -> Any:
        """The codes of a batch: its k·b largest pre-activations."""
        codes, self.bracket = self.kernels.batch_topk(pre, self.sae.k * len(pre), self.bracket)
        return codes

    def _fit_thresholds(
        self, pre: Tensor, codes: Any, error: Tensor, scale: float, adam: Adam
    ) -> float | Tensor:
        """Learn what decides which activations are kept, if anything does. Returns L0."""
        return self.sae.k

    def _dead(self) -> tuple[Tensor, int | Tensor]:
        """The dead features, and how many they are; on a GPU the list is padded with -1."""
        dead = self.silent >= self.settings.dead_after
        if dead.device.type == "cpu":
            found = dead.nonzero()[:, 0]
            return found, found.shape[0]
        size = min(-(-self._bound() // _PAD) * _PAD, dead.shape[0])
        return torch.nonzero_static(dead, size=size, fill_value=-1)[:, 0], dead.sum()

    def _bound(self) -> int:
        """No fewer than the dead features, without waiting for the step that the GPU is at.

        A feature that is dead now was silent for nearly as long a few steps ago: what was counted
        then has reached the host.
        """
        lag = min(_LAG, self.settings.dead_after - 1)
        soon = (self.silent >= self.settings.dead_after - lag).sum()
        event = torch.cuda.Event()
        self._soon_dead.append((soon.to("cpu", non_blocking=True), event))
        event.record()
        if len(self._soon_dead) <= lag:  # the first steps
            return int(soon)
        count, event = self._soon_dead.popleft()
        event.synchronize()
        return int(count)

    def _aux(
        self, pre: Tensor, centred: Tensor, error: Tensor, dead: Tensor
    ) -> tuple[Extra, Tensor, Tensor | None]:
        """AuxK: gradient of w · mean (e - e_hat)² on the dead features' rows, the mean, e_hat - e.

        Dense products over the dead columns: k_aux is not small against them.
        """
        (b, d), n, m = error.shape, self.sae.n_features, dead.shape[0]
        # The last place takes what pads the list of dead features.
        position = torch.full((n + 1,), -1, dtype=torch.int32, device=dead.device)
        if m == 0 or self.settings.aux_weight == 0:
            none = error.new_empty(0, d)
            return Extra(position[:n], none, none, none[:, 0]), error.new_zeros(()), None
        position[dead] = torch.arange(m, dtype=torch.int32, device=dead.device)
        acts = self.kernels.row_topk(pre, dead, self.settings.k_aux)
        rows = self.W_dec[dead].to(acts.dtype)
        miss = (acts @ rows).to(error.dtype) - error
        loss = miss.square().mean()
        low = miss.to(acts.dtype)
        g_pre = (low @ rows.T).mul_(acts.sign())  # acts are not negative
        scale = 2 * self.settings.aux_weight / (b * d)
        extra = Extra(
            position[:n],
            (acts.T @ low).to(error.dtype).mul_(scale),
            (g_pre.T @ centred).to(error.dtype).mul_(scale),
            g_pre.sum(0, dtype=error.dtype).mul_(scale),
        )
        return extra, loss, miss


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
        self, sae: JumpReLU, settings: Settings, workspace: Workspace | None = None
    ) -> None:
        super().__init__(sae, settings, workspace)
        self.moments_t = torch.zeros_like(sae.threshold), torch.zeros_like(sae.threshold)
        self.width = settings.bandwidth * math.sqrt(sae.d_in)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        m, v = self.moments_t
        return super().state() | {"threshold": self.sae.threshold, "m_t": m, "v_t": v}

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
        slope = 2 * self.settings.sparsity_weight * (l0 / self.sae.k - 1) / (self.sae.k * b)
        gradient = (theta * scale * dots + slope * counts) / -self.width
        scaled = adam._replace(learning_rate=adam.learning_rate * math.sqrt(d))
        kernels.adam_step(theta, *self.moments_t, gradient * math.sqrt(d), scaled)
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
        self.n_primary, self.n_meta = spec.phases or (
            training.n_primary_steps, training.n_meta_steps
        )  # fmt: skip
        self.batch_tokens = training.batch_tokens
        self.ortsae = (training.ortsae_weight, training.ortsae_chunk)
        settings = Settings(
            training.learning_rate,
            (training.betas[0], training.betas[1]),
            getattr(torch, training.dtype),
            training.k_aux,
            training.aux_weight,
            training.dead_after,
            spec.kind == "as-released",
            training.jumprelu_bandwidth,
            training.jumprelu_weight,
        )
        sizes_of = d_in, sizes.n_features, spec.k or sizes.k, spec.seed
        self.primary: Learner
        if spec.kind == "jumprelu":
            self.primary = JumpReLULearner(JumpReLU(*sizes_of).to(device), settings, workspace)
        else:
            self.primary = Learner(BatchTopK(*sizes_of).to(device), settings, workspace)
        self.meta: Learner | None = None
        if spec.has_meta:
            meta = BatchTopK(
                d_in, sizes.n_meta_features, spec.meta_k or sizes.meta_k, spec.seed + _META_SEED
            )
            self.meta = Learner(
                meta.to(device),
                replace(settings, learning_rate=training.meta_learning_rate),
                workspace,
            )
        self.rows: list[tuple[float, ...]] = []
        self.seconds = 0.0
        self._meta_l2: float | Tensor = math.nan
        self._unread: list[Tensor] = []  # L2 of steps that the host has not looked at

    def step(self, z: Tensor) -> Losses:
        """One primary step; a meta phase follows each n_p of them. z: (b, d) normalised.

        Raises TrainingError if the loss is not finite.
        """
        started = time.perf_counter()
        with one_thread_if_small(z.numel() * self.primary.sae.n_features):
            pull, penalty = self._pull()
            losses = self.primary.step(z, pull)
            self._check(losses, z)
            self.step_count += 1
            if self.meta is not None and self.step_count % self.n_primary == 0:
                rows, _ = self._rows()
                for _ in range(self.n_meta):
                    self._meta_l2 = self._check(self.meta.step(rows), rows).l2
        self._unread.append(losses.l2)
        self.seconds += time.perf_counter() - started
        if self.step_count % HISTORY_EVERY == 0:
            self._read()
            self.rows.append(
                (
                    self.step_count,
                    self.step_count * self.batch_tokens,
                    losses.l2.item(),
                    losses.aux.item(),
                    float(penalty),
                    float(losses.l0),
                    int(losses.dead),
                    float(self._meta_l2),
                    self.seconds,
                )
            )
        return losses

    def last_row(self) -> dict[str, float]:
        """The newest row of the history."""
        return dict(zip(_HISTORY, self.rows[-1], strict=True))

    def history(self) -> pd.DataFrame:
        """Step, tokens, l2, aux, penalty (mean p_i), l0, dead, meta_l2, seconds."""
        frame = pd.DataFrame(self.rows, columns=list(_HISTORY))
        return frame.astype({"step": int, "tokens": int, "l0": float, "dead": int})

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, and the history."""
        self._read()  # what is kept is sound
        learners = {"primary": self.primary} | ({"meta": self.meta} if self.meta else {})
        tensors = {
            f"{name}.{key}": tensor
            for name, learner in learners.items()
            for key, tensor in learner.state().items()
        }
        history = torch.tensor(self.rows, dtype=torch.float64).view(-1, len(_HISTORY))
        return tensors | {
            "history": history,
            "progress": torch.tensor(
                [self.step_count, self.seconds, float(self._meta_l2)], dtype=torch.float64
            ),
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

    def _pull(self) -> tuple[Pull | None, float | Tensor]:
        """Gradient of the arm's penalty on the decoder rows, and mean p_i; the meta is a constant.

        The meta dictionary rebuilds normalised rows; in decoder space its error is larger by what
        the row was divided by.
        """
        if self.spec.kind == "ortsae":
            weight, chunk = self.ortsae
            generator = torch.Generator().manual_seed((self.spec.seed << 32) + self.step_count)
            penalty, gradient = orthogonality(self.primary.W_dec, chunk, generator)
            return Pull(gradient, gradient.new_full((len(gradient),), weight)), penalty
        if self.meta is None:
            return None, math.nan
        if self.spec.lambda2 == 0 and (self.step_count + 1) % HISTORY_EVERY:
            return None, math.nan  # nothing pulls, and no row of the history asks for p_i
        assert self.spec.sigma_sq is not None
        rows, scale = self._rows()
        error, square = self.meta.errors(rows)
        square = square * scale * scale
        factor = penalty_pull(square, self.spec.lambda2 or 0.0, self.spec.sigma_sq)
        return Pull(error, factor * scale), decomposability(square, self.spec.sigma_sq).mean()

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The decoder's rows as inputs of the meta dictionary, and what each was divided by."""
        return self.primary.kernels.normalise_rows(self.primary.W_dec, EPS)

    def _check(self, losses: Losses, inputs: Tensor) -> Losses:
        """On a CPU, stop at the first loss that is not finite."""
        if losses.l2.device.type == "cpu" and not math.isfinite(losses.l2.item()):
            blame = (
                "the loss is not finite: lower the learning rate"
                if inputs.isfinite().all()
                else "the residuals of the batch hold NaN or infinite values"
            )
            raise TrainingError(self._at(self.step_count) + blame)
        return losses

    def _read(self) -> None:
        """On a GPU, stop if a loss that was not looked at yet is not finite."""
        finite = [math.isfinite(l2) for l2 in self._unread]
        if not all(finite):
            first = self.step_count - len(finite) + finite.index(False)
            raise TrainingError(
                self._at(first) + "the loss is not finite: lower the learning rate, or look for "
                "NaN in the residuals; the last checkpoint is from before"
            )
        self._unread.clear()

    def _at(self, batch: int) -> str:
        return f"arm {self.spec.name}, step {batch + 1}, batch {batch}: "


# --------------------------------------------------------------------------- checkpoints


def save_checkpoint(trainer: Trainer, folder: Path, key: str, final: bool) -> Path:
    """Write the whole state of an arm as one file, then drop other checkpoints and remains.

    The file is there whole or not at all; states at which an arm was finished (`final-<step>`)
    stay, so that shorter and longer trainings can start from them.
    """
    step = trainer.step_count
    path = folder / f"{'final' if final else 'checkpoint'}-{step}.safetensors"
    state = {name: tensor.cpu().contiguous() for name, tensor in trainer.state().items()}
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata={"arm": key})
    for older in folder.iterdir():
        if older.name.startswith(("checkpoint-", ".")) and older != path:
            older.unlink()
    return path


def restore_checkpoint(trainer: Trainer, path: Path, key: str) -> None:
    """Continue from a checkpoint. TrainingError names a truncated or a foreign one."""
    advice = f"delete it to train arm {trainer.spec.name} from the checkpoint before, or anew"
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("arm") != key:
                raise TrainingError(f"{path} belongs to another arm: {advice}")
            trainer.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except TrainingError:
        raise
    except Exception as error:  # safetensors raises types of its own on a cut file
        raise TrainingError(f"{path} is damaged ({error}): {advice}") from None


def latest_checkpoint(folder: Path, steps: int) -> Path | None:
    """The most advanced state in a folder that has not gone beyond `steps`."""
    found = [_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()]
    reached = {int(match[1]): match[0] for match in found if match and int(match[1]) <= steps}
    return folder / reached[max(reached)] if reached else None


# --------------------------------------------------------------------------- arms of a run


@dataclass
class _Place:
    """Where an arm is kept: `state` while it can go on, `result` once it has been trained."""

    spec: ArmSpec
    state: Artefact
    result: Artefact


def _inputs(profile: Profile, spec: ArmSpec, residuals: dict[str, Any]) -> dict[str, Any]:
    """What decides an arm's weights, but for the number of steps."""
    training = profile.training.model_dump()
    names = [
        "batch_tokens", "learning_rate", "betas", "dtype", "k_aux", "aux_weight", "dead_after"
    ]  # fmt: skip
    if spec.has_meta:
        names += ["meta_learning_rate", "n_primary_steps", "n_meta_steps"]
    names += [name for name in training if name.startswith(f"{spec.kind}_")]
    sizes = profile.dictionary.model_dump()
    return {
        "arm": asdict(spec),
        "residuals": residuals,
        "dictionary": {
            name: size for name, size in sizes.items() if spec.has_meta or "meta" not in name
        },
        "training": {name: training[name] for name in names},
    }


def _place(run: Run, spec: ArmSpec, residuals: dict[str, Any]) -> _Place:
    inputs = _inputs(run.profile, spec, residuals)
    return _Place(
        spec,
        run.artefact("arm-state", inputs, VERSION),
        run.artefact("arm", {**inputs, "steps": run.profile.steps}, VERSION),
    )


def _places(run: Run) -> list[_Place]:
    residuals = Residuals(run, "train").inputs
    return [_place(run, spec, residuals) for spec in run.profile.arms()]


Watch = Callable[[str, dict[str, float]], None]


def train_arms(run: Run, watch: Watch | None = None) -> dict[str, Arm]:
    """Train every arm of the run's profile that is not trained yet, all from one stream.

    Arms in memory together take the same batches; how they are grouped changes nothing. Arms go on
    from their latest checkpoint. watch: called with an arm's name and each row of its history.
    Returns all arms by name, in the profile's order. Raises TrainingError if even one arm alone
    does not fit in memory, if a loss is not finite (arm, step and batch named), or if a checkpoint
    is damaged.
    """
    places = _places(run)
    # Of the processes of a launcher, one holds the locks for all.
    with locked(place.state for place in places if distributed.rank() == 0):
        distributed.barrier()
        _train_missing(run, [p for p in places if p.spec.kind != "matched-fidelity"], watch)
        for place in places:
            if place.spec.kind == "matched-fidelity" and not place.result.complete:
                _match_fidelity(run, place, places, watch)
    return load_arms(run)


def tensorboard(folder: Path) -> Watch:
    """A `watch` for :func:`train_arms`: one TensorBoard run an arm, in folders of their names.

    Raises TrainingError if the package is not there: it is an extra of ours.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "TensorBoard is not installed: pip install 'metasae-lib[tensorboard]'"
        ) from None
    writers: dict[str, SummaryWriter] = {}

    def watch(arm: str, row: dict[str, float]) -> None:
        step = int(row["step"])
        if arm not in writers:
            # What a killed process wrote beyond its last checkpoint is written again.
            writers[arm] = SummaryWriter(str(folder / arm), purge_step=step)
        for name, value in row.items():
            if name not in ("step", "tokens") and not math.isnan(value):
                writers[arm].add_scalar(name, value, step)
        writers[arm].flush()

    return watch


def load_arms(run: Run) -> dict[str, Arm]:
    """The trained arms of a run, by name. TrainingError names those that are missing."""
    places = _places(run)
    missing = [place.spec.name for place in places if not place.result.complete]
    if missing:
        raise TrainingError(
            f"{len(missing)} of {len(places)} arms of run {run.name} are not trained "
            f"({', '.join(missing)}): run the notebook 02_training first"
        )
    return {place.spec.name: _load(place) for place in places}


def _load(place: _Place) -> Arm:
    folder = place.result.folder
    sae = Dictionary.load(folder / "sae")
    return Arm(
        replace(place.spec, k=sae.k) if place.spec.kind == "matched-fidelity" else place.spec,
        sae,
        BatchTopK.load(meta) if (meta := folder / "meta").exists() else None,
        pd.read_csv(folder / "history.csv"),
        folder,
    )


def _train_missing(run: Run, places: Sequence[_Place], watch: Watch | None) -> None:
    missing = [place for place in places if not place.result.complete]
    distributed.barrier()  # all have looked before the first is finished
    if not missing:
        return
    stream = BatchStream(run)
    device = compute_device(run.profile)
    for group in _groups(run.profile, missing, stream.residuals.d, device):
        mine = group[distributed.rank() :: distributed.world_size()]
        _train_group(run, mine, stream, device, watch)
        distributed.barrier()


def _train_group(
    run: Run,
    places: Sequence[_Place],
    stream: BatchStream,
    device: torch.device,
    watch: Watch | None = None,
) -> None:
    """Train arms side by side: each batch is read once and given to all that are at its step."""
    profile, steps = run.profile, run.profile.steps
    workspace = Workspace()
    trainers = []
    for place in places:
        trainer = Trainer(place.spec, profile, stream.residuals.d, device, workspace)
        path = latest_checkpoint(place.state.folder, steps)
        if path is not None:
            restore_checkpoint(trainer, path, place.state.key)
        trainers.append(trainer)
    # Processes that share residuals walk through the text together.
    first = distributed.least(min((trainer.step_count for trainer in trainers), default=steps))
    arms = places[0].spec.name if len(places) == 1 else f"{len(places)} arms"
    with progress(steps * profile.training.batch_tokens, f"training {arms}") as bar:
        bar.update(first * profile.training.batch_tokens)
        for step in range(first, steps):
            active = [trainer for trainer in trainers if trainer.step_count == step]
            batches: dict[int, Tensor] = {}
            for order in {trainer.spec.order for trainer in active} or {0}:
                raw = stream.batch(step, order).to(device, torch.float32)
                batches[order] = normalise(raw)[0]
            losses = [trainer.step(batches[trainer.spec.order]) for trainer in active]
            bar.update(profile.training.batch_tokens)
            if (step + 1) % HISTORY_EVERY == 0 and active:
                bar.set_postfix_str(_state_line(losses))
                if watch is not None:
                    for trainer in active:
                        watch(trainer.spec.name, trainer.last_row())
            if (step + 1) % profile.training.checkpoint_every == 0 and step + 1 < steps:
                for place, trainer in zip(places, trainers, strict=True):
                    if trainer in active:
                        save_checkpoint(trainer, place.state.folder, place.state.key, False)
    for place, trainer in zip(places, trainers, strict=True):
        save_checkpoint(trainer, place.state.folder, place.state.key, True)
        _save_result(run.profile, place, trainer)


def _state_line(losses: Sequence[Losses]) -> str:
    """The arms' losses in a few words: the range of L2, and the most dead features."""
    l2 = [loss.l2.item() for loss in losses]
    span = f"{min(l2):.4f}" if len(l2) == 1 else f"{min(l2):.4f}–{max(l2):.4f}"
    l0 = max(float(loss.l0) for loss in losses)
    return f"L2 {span}, L0 ≤ {l0:.1f}, dead ≤ {max(int(loss.dead) for loss in losses)}"


def _save_result(profile: Profile, place: _Place, trainer: Trainer) -> None:
    about = {
        "model_name": profile.model.source,
        "hook_name": f"blocks.{profile.model.layer}.hook_resid_pre",
        "context_size": profile.text.context_length,
        "prepend_bos": profile.text.bos == "every_row",
        "arm": place.spec.name,
    }
    folder = place.result.folder
    trainer.primary.sae.save(folder / "sae", about)
    if trainer.meta is not None:
        trainer.meta.sae.save(folder / "meta")
    with atomic_write(folder / "history.csv") as path:
        trainer.history().to_csv(path, index=False)
    place.result.finish({"seconds": trainer.seconds})


# --------------------------------------------------------------------------- matched fidelity


def final_l2(history: pd.DataFrame) -> float:
    """Mean L2 over the last tenth of an arm's training batches, which all arms share."""
    return float(history["l2"].tail(max(1, len(history) // 10)).mean())


def _match_fidelity(run: Run, place: _Place, places: Sequence[_Place], watch: Watch | None) -> None:
    """Find the k at which a plain dictionary is as bad a reconstruction as a joint arm.

    A search by secants over log k and log L2, each point a dictionary trained in full, until the
    next whole k has been tried; the nearest in L2 is taken. Its table is kept as `search.csv`.
    """
    spec, full = place.spec, run.profile.dictionary.k
    residuals = Residuals(run, "train").inputs
    trained = {other.spec: other for other in places}
    joint = trained[replace(spec, kind="joint")]
    target = final_l2(_load(joint).history)
    tried = {full: trained[ArmSpec("solo", spec.seed, order=spec.order)]}
    found = {full: final_l2(_load(tried[full]).history)}
    exponent = -0.5  # of L2 in k, until two points tell
    while True:
        nearest = min(found, key=lambda k: abs(found[k] - target))
        if len(found) > 1:
            one, two = sorted(found, key=lambda k: abs(found[k] - target))[:2]
            exponent = math.log(found[one] / found[two]) / math.log(one / two)
        if exponent == 0:
            break
        wanted = nearest * (target / found[nearest]) ** (1 / exponent)
        k = min(max(round(wanted), 1), run.profile.dictionary.n_features)
        if k in found:
            break
        plain = replace(spec, kind="batchtopk", lambda2=None, sigma_sq=None, k=k)
        # An arm of the run (of the ablation, say) is trained by now, and its lock is held.
        tried[k] = trained.get(plain) or _place(run, plain, residuals)
        with locked([tried[k].state] if plain not in trained and distributed.rank() == 0 else []):
            _train_missing(run, [tried[k]], watch)
        found[k] = final_l2(_load(tried[k]).history)
    if distributed.rank() == 0:
        source, folder = tried[nearest].result.folder, place.result.folder
        shutil.copytree(source / "sae", folder / "sae", dirs_exist_ok=True)
        shutil.copy(source / "history.csv", folder)
        with atomic_write(folder / "search.csv") as path:
            rows = [{"k": k, "l2": l2, "target": target} for k, l2 in found.items()]
            pd.DataFrame(rows).to_csv(path, index=False)
        place.result.finish()
    distributed.barrier()


# --------------------------------------------------------------------------- memory


def arm_bytes(profile: Profile, d_in: int, spec: ArmSpec) -> int:
    """Memory that one arm holds between steps: weights, two moments each, the products' copy."""
    sizes = profile.dictionary
    features = sizes.n_features
    if spec.has_meta:
        features += sizes.n_meta_features
    return features * d_in * (6 * 4 + 2)


def step_bytes(profile: Profile, d_in: int) -> int:
    """Memory that a step needs besides, shared by all arms of a group.

    The pre-activations, as much again for the dead features' part of them and its gradient, and
    what has the size of a batch or (for a meta dictionary) of the decoder.
    """
    sizes, training = profile.dictionary, profile.training
    width = 2 if training.dtype == "bfloat16" else 4
    inputs = max(training.batch_tokens, sizes.n_features)
    features = training.batch_tokens * sizes.n_features + sizes.n_features * sizes.n_meta_features
    return 4 * width * features + 8 * 4 * inputs * d_in


def _groups(
    profile: Profile, places: Sequence[_Place], d_in: int, device: torch.device
) -> Iterator[list[_Place]]:
    """Arms that fit in memory together, in order, dealt out to the processes of a launcher.

    TrainingError if one arm alone does not fit.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        # What the page cache holds can be had. Processes without a GPU share one memory.
        free = psutil.virtual_memory().available // distributed.world_size()
    free = distributed.least(free)
    budget = _MEMORY_SHARE * free - step_bytes(profile, d_in)
    group: list[_Place] = []
    held = [0] * distributed.world_size()
    for place in places:
        size = arm_bytes(profile, d_in, place.spec)
        if size > budget:
            raise TrainingError(_too_large(profile, d_in, place.spec, free))
        if held[len(group) % len(held)] + size > budget:
            yield group
            group, held = [], [0] * len(held)
        held[len(group) % len(held)] += size
        group.append(place)
    if group:
        yield group


def _too_large(profile: Profile, d_in: int, spec: ArmSpec, free: int) -> str:
    """Why an arm cannot be trained here, and the largest sizes that could be."""

    def need(n_features: int, batch_tokens: int) -> float:
        dictionary = profile.dictionary.model_copy(update={"n_features": n_features})
        training = profile.training.model_copy(update={"batch_tokens": batch_tokens})
        smaller = profile.model_copy(update={"dictionary": dictionary, "training": training})
        return (arm_bytes(smaller, d_in, spec) + step_bytes(smaller, d_in)) / _MEMORY_SHARE

    n, b = profile.dictionary.n_features, profile.training.batch_tokens
    text = (
        f"arm {spec.name} needs {need(n, b) / 2**30:.1f} GiB of free memory and "
        f"{free / 2**30:.1f} are there: "
    )
    fitting = [
        f"{key} {max(sizes):,}"
        for key, sizes in (
            ("training.batch_tokens", [x for x in _halves(b) if need(n, x) <= free]),
            ("dictionary.n_features", [x for x in _halves(n) if need(x, b) <= free]),
        )
        if sizes
    ]
    return text + (" or ".join(fitting) + " would fit" if fitting else "use a larger machine")


def _halves(size: int) -> list[int]:
    return [size >> i for i in range(1, size.bit_length())]
