"""The alternating loop of one arm (Eq. 3): primary steps, meta steps, checkpoints."""

from __future__ import annotations

import math
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metasae_lib.study import ArmSpec, Profile, TrainingError, atomic_write
from metasae_lib.train.dictionary import EPS, BatchTopK, JumpReLU
from metasae_lib.train.kernels.common import Pull
from metasae_lib.train.learner import (
    JumpReLULearner,
    Learner,
    Losses,
    Settings,
    one_thread_if_small,
)
from metasae_lib.train.penalty import decomposability, orthogonality, penalty_pull
from metasae_lib.train.replay import Replay, Workspace

HISTORY_EVERY = 10  # steps between two rows of an arm's history
#: Columns of an arm's history, and their types.
HISTORY = dict.fromkeys(
    ("step", "tokens", "l2", "aux", "penalty", "l0", "dead", "meta_l2", "seconds"), float
) | dict.fromkeys(("step", "tokens", "dead"), int)
_META_SEED = 1_000_003  # added to an arm's seed for its meta dictionary
_CHECKPOINT = re.compile(r"(?:final|checkpoint)-(\d+)\.safetensors")


class Trainer:
    """One arm in training: the primary dictionary, its meta dictionary, counters, history."""

    def __init__(
        self,
        spec: ArmSpec,
        profile: Profile,
        d_in: int,
        device: torch.device,
        matrices: Workspace | None = None,
    ) -> None:
        sizes, training = profile.dictionary, profile.training
        self.spec, self.training, self.step_count = spec, training, 0
        self.phases = spec.phases or (training.n_primary_steps, training.n_meta_steps)
        asked: dict[str, Any] = {f.name: getattr(training, f.name, None) for f in fields(Settings)}
        own = {
            "dtype": getattr(torch, training.dtype),
            "as_released": spec.kind == "as-released",
            "prefixes": profile.prefixes if spec.kind == "matryoshka" else (),
        }
        settings = Settings(**(asked | own))
        shape = d_in, sizes.n_features, spec.k or sizes.k, spec.seed
        self.primary = (
            JumpReLULearner(JumpReLU(*shape).to(device), settings, matrices)
            if spec.kind == "jumprelu"
            else Learner(BatchTopK(*shape).to(device), settings, matrices)
        )
        self.meta: Learner | None = None
        if spec.has_meta:
            k, seed = spec.meta_k or sizes.meta_k, spec.seed + _META_SEED
            meta = BatchTopK(d_in, sizes.n_meta_features, k, seed).to(device)
            settings = replace(settings, learning_rate=training.meta_learning_rate)
            self.meta = Learner(meta, settings, matrices)
        self.rows: list[tuple[float, ...]] = []
        self.seconds = 0.0
        self._meta_l2: float | Tensor = math.nan
        self._replay = Replay(self.primary.workspace, device)
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
            n_primary, n_meta = self.phases
            if self.meta is not None and self.step_count % n_primary == 0:
                rows, _ = self._rows()
                for _ in range(n_meta):
                    self._meta_l2 = self._check(self.meta.step(rows), rows).l2
        self._unread.append(losses.l2)
        self.seconds += time.perf_counter() - started
        if self.step_count % HISTORY_EVERY == 0:
            self._read()
            tokens = self.step_count * self.training.batch_tokens
            row = (self.step_count, tokens, losses.l2, losses.aux, penalty, losses.l0, losses.dead)
            self.rows.append(tuple(map(float, (*row, self._meta_l2, self.seconds))))
        return losses

    def last_row(self) -> dict[str, float]:
        """The newest row of the history."""
        return dict(zip(HISTORY, self.rows[-1], strict=True))

    def history(self) -> pd.DataFrame:
        """Step, tokens, l2, aux, penalty (mean p_i), l0, dead, meta_l2, seconds."""
        return pd.DataFrame(self.rows, columns=list(HISTORY), dtype=float).astype(HISTORY)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, and the history."""
        self._read()  # what is kept is sound
        tensors = {
            f"{name}.{key}": tensor
            for name, learner in self._learners()
            for key, tensor in learner.state().items()
        }
        progress = [self.step_count, self.seconds, float(self._meta_l2)]
        return tensors | {
            "history": torch.tensor(self.rows, dtype=torch.float64).view(-1, len(HISTORY)),
            "progress": torch.tensor(progress, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        for name, learner in self._learners():
            learner.restore({key: state[f"{name}.{key}"] for key in learner.state()})
        self.rows = [tuple(row) for row in state["history"].tolist()]
        step, self.seconds, self._meta_l2 = state["progress"].tolist()
        self.step_count = int(step)

    def _learners(self) -> list[tuple[str, Learner]]:
        return [("primary", self.primary), *([("meta", self.meta)] if self.meta else [])]

    def _pull(self) -> tuple[Pull | None, float | Tensor]:
        """Gradient of the arm's penalty on the decoder rows, and mean p_i; the meta is a constant.

        The meta dictionary rebuilds normalised rows; in decoder space its error is larger by what
        the row was divided by.
        """
        if self.spec.kind == "ortsae":
            generator = torch.Generator().manual_seed((self.spec.seed << 32) + self.step_count)
            W_dec, chunk = self.primary.W_dec, self.training.ortsae_chunk
            penalty, gradient = orthogonality(W_dec, chunk, generator)
            weights = gradient.new_full((len(gradient),), self.training.ortsae_weight)
            return Pull(gradient, weights), penalty
        if self.meta is None:
            return None, math.nan
        if self.spec.lambda2 == 0 and (self.step_count + 1) % HISTORY_EVERY:
            return None, math.nan  # nothing pulls, and no row of the history asks for p_i
        pull, penalty = self._replay("pull", self._felt)
        return pull, penalty.clone()

    def _felt(self) -> tuple[Pull, Tensor]:
        assert self.meta is not None and self.spec.sigma_sq is not None
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
