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
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metasae_lib import kernels
from metasae_lib.activations import BatchStream, Residuals
from metasae_lib.dictionary import BatchTopK, normalise, scale_of
from metasae_lib.errors import TrainingError
from metasae_lib.kernels import Adam, Extra, Pull
from metasae_lib.penalty import decomposability, penalty_pull
from metasae_lib.profile import ArmSpec, Profile
from metasae_lib.progress import progress
from metasae_lib.run import Artefact, Run, atomic_write, locked
from metasae_lib.subject import compute_device

VERSION = 1  # of the stage: raise it when the same inputs give other weights
HISTORY_EVERY = 10  # steps between two rows of an arm's history
_HISTORY = ("step", "tokens", "l2", "aux", "penalty", "l0", "dead", "meta_l2", "seconds")
_META_SEED = 1_000_003  # added to an arm's seed for its meta dictionary
_MEMORY_SHARE = 0.7  # of the free memory that training may plan with
_SMALL = 200_000_000  # multiply-adds of an encoder product that one thread does in a few ms
_CHECKPOINT = re.compile(r"(?:final|checkpoint)-(\d+)\.safetensors")


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
            self._matrices[key] = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
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
            self.W_enc_T, self._low, self.W_dec, self.moments, codes, dots, z, error, self.b_dec,
            scale, extra, pull, adam,
        )  # fmt: skip
        kernels.adam_step(self.b_dec, *self.moments_b, g_b, adam)
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
        codes, self.bracket = self.kernels.batch_topk(pre, self.sae.k * z.shape[0], self.bracket)
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


@contextmanager
def _one_thread_if_small(products: int) -> Iterator[None]:
    """A small step has many short loops: on a busy machine each would wait for other threads."""
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
        with _one_thread_if_small(z.numel() * self.primary.sae.n_features):
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
        return frame.astype({"step": int, "tokens": int, "l0": float, "dead": int})

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
    primary = (
        "batch_tokens", "learning_rate", "betas", "dtype", "k_aux", "aux_weight", "dead_after"
    )  # fmt: skip
    meta = ("meta_learning_rate", "n_primary_steps", "n_meta_steps")
    sizes = profile.dictionary.model_dump()
    joint = spec.kind in ("joint", "control")
    return {
        "arm": {
            "kind": spec.kind, "seed": spec.seed, "lambda2": spec.lambda2, "sigma_sq": spec.sigma_sq
        },
        "residuals": residuals,
        "dictionary": {
            name: size for name, size in sizes.items() if joint or "meta" not in name
        },
        "training": {name: training[name] for name in (*primary, *(meta if joint else ()))},
    }  # fmt: skip


def _places(run: Run) -> list[_Place]:
    residuals = Residuals(run, "train").inputs
    places = []
    for spec in run.profile.arms():
        inputs = _inputs(run.profile, spec, residuals)
        places.append(
            _Place(
                spec,
                run.artefact("arm-state", inputs, VERSION),
                run.artefact("arm", {**inputs, "steps": run.profile.steps}, VERSION),
            )
        )
    return places


def train_arms(run: Run) -> dict[str, Arm]:
    """Train every arm of the run's profile that is not trained yet, all from one stream.

    Arms in memory together take the same batches; how they are grouped changes nothing. Arms go on
    from their latest checkpoint. Returns all arms by name, in the profile's order. Raises
    TrainingError if even one arm alone does not fit in memory, if a loss is not finite (arm, step
    and batch named), or if a checkpoint is damaged.
    """
    places = _places(run)
    with locked(place.state for place in places):
        missing = [place for place in places if not place.result.complete]
        if missing:
            stream = BatchStream(run, order_seed=0)
            device = compute_device(run.profile)
            for group in _groups(run.profile, missing, stream.residuals.d, device):
                _train_group(run, group, stream, device)
    return load_arms(run)


def load_arms(run: Run) -> dict[str, Arm]:
    """The trained arms of a run, by name. TrainingError names those that are missing."""
    places = _places(run)
    missing = [place.spec.name for place in places if not place.result.complete]
    if missing:
        raise TrainingError(
            f"{len(missing)} of {len(places)} arms of run {run.name} are not trained "
            f"({', '.join(missing)}): run the notebook 02_training first"
        )
    return {
        place.spec.name: Arm(
            place.spec,
            BatchTopK.load(place.result.folder / "sae"),
            BatchTopK.load(meta) if (meta := place.result.folder / "meta").exists() else None,
            pd.read_csv(place.result.folder / "history.csv"),
            place.result.folder,
        )
        for place in places
    }


def _train_group(
    run: Run, places: Sequence[_Place], stream: BatchStream, device: torch.device
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
    first = min(trainer.step_count for trainer in trainers)
    arms = f"{len(trainers)} arms" if len(trainers) > 1 else trainers[0].spec.name
    with progress(steps * profile.training.batch_tokens, f"training {arms}") as bar:
        bar.update(first * profile.training.batch_tokens)
        for step in range(first, steps):
            z = normalise(stream.batch(step).to(device, torch.float32))[0]
            active = [trainer for trainer in trainers if trainer.step_count == step]
            losses = [trainer.step(z) for trainer in active]
            bar.update(profile.training.batch_tokens)
            if (step + 1) % HISTORY_EVERY == 0:
                bar.set_postfix(l2=f"{losses[-1].l2.item():.4f}", dead=losses[-1].dead)
            if (step + 1) % profile.training.checkpoint_every == 0 and step + 1 < steps:
                for place, trainer in zip(places, trainers, strict=True):
                    if trainer in active:
                        save_checkpoint(trainer, place.state.folder, place.state.key, False)
    for place, trainer in zip(places, trainers, strict=True):
        save_checkpoint(trainer, place.state.folder, place.state.key, True)
        _save_result(run.profile, place, trainer)


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


# --------------------------------------------------------------------------- memory


def arm_bytes(profile: Profile, d_in: int, kind: str) -> int:
    """Memory that one arm holds between steps: weights, two moments each, the products' copy."""
    sizes = profile.dictionary
    features = sizes.n_features
    if kind in ("joint", "control"):
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
    """Arms that fit in memory together, in order. TrainingError if one alone does not fit."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available  # what the page cache holds can be had
    budget = _MEMORY_SHARE * free - step_bytes(profile, d_in)
    group: list[_Place] = []
    held = 0
    for place in places:
        size = arm_bytes(profile, d_in, place.spec.kind)
        if size > budget:
            need = (size + step_bytes(profile, d_in)) / _MEMORY_SHARE
            raise TrainingError(
                f"arm {place.spec.name} needs {need / 2**30:.1f} GiB of free memory and "
                f"{free / 2**30:.1f} are there: lower dictionary.n_features or "
                "training.batch_tokens, or use a larger machine"
            )
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(place)
        held += size
    if group:
        yield group
