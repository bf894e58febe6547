"""The arms of a run, trained from one stream of residuals: each batch is read once for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metasae_lib.study import (
    ArmSpec,
    Artefact,
    Profile,
    Run,
    TrainingError,
    atomic_write,
    distributed,
    progress,
)
from metasae_lib.study.plan import MEMORY_SHARE, arm_bytes, step_bytes
from metasae_lib.study.run import locked
from metasae_lib.subject import BatchStream, Residuals, SampleStream
from metasae_lib.subject.model import compute_device, free_memory, release_subject
from metasae_lib.train.dictionary import BatchTopK, Dictionary, normalise
from metasae_lib.train.given import check_given, given_files, load_given
from metasae_lib.train.learner import Losses
from metasae_lib.train.replay import Workspace
from metasae_lib.train.start import Name, Start
from metasae_lib.train.trainer import (
    HISTORY,
    HISTORY_EVERY,
    Trainer,
    latest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)

VERSION = 2  # of the stage: raise it when the same inputs give other weights


@dataclass(frozen=True)
class Arm:
    """A trained arm, or a given one. history: one row each :data:`HISTORY_EVERY` steps."""

    spec: ArmSpec
    sae: Dictionary
    meta: BatchTopK | None
    history: pd.DataFrame
    folder: Path


@dataclass
class _Place:
    """Where an arm is kept: `state` while it can go on, `result` once it has been trained."""

    spec: ArmSpec
    state: Artefact
    result: Artefact


def _place(run: Run, spec: ArmSpec, residuals: dict[str, Any]) -> _Place:
    if spec.kind in run.profile.training.given:
        files = given_files(run.profile, spec.kind)
        inputs = {"arm": asdict(spec), "residuals": residuals, "files": files}
        artefact = run.artefact("arm", inputs, VERSION)
        return _Place(spec, artefact, artefact)
    training, sizes = run.profile.training.model_dump(), run.profile.dictionary.model_dump()
    names = {
        "batch_tokens", "learning_rate", "betas", "dtype", "k_aux", "aux_weight", "dead_after"
    }  # fmt: skip
    if spec.has_meta:
        names |= {"meta_learning_rate", "n_primary_steps", "n_meta_steps"}
    names |= {name for name in training if name.startswith(f"{spec.kind}_")}
    if _start(run.profile, spec) != "zeros":
        names |= {"start"}
    # What decides an arm's weights, but for the number of steps.
    inputs = {
        "arm": asdict(spec),
        "residuals": residuals,
        "dictionary": {k: sizes[k] for k in sizes if spec.has_meta or "meta" not in k},
        "training": {name: training[name] for name in names},
    }
    result = run.artefact("arm", {**inputs, "steps": run.profile.steps}, VERSION)
    return _Place(spec, run.artefact("arm-state", inputs, VERSION), result)


def _start(profile: Profile, spec: ArmSpec) -> Name:
    return "zeros" if spec.kind == "zero-start" else profile.training.start


def _places(run: Run) -> list[_Place]:
    check_given(run)
    source = SampleStream(run) if run.profile.synthetic else Residuals(run, "train")
    return [_place(run, spec, source.inputs) for spec in run.profile.arms()]


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
        _train_missing(run, places, watch)
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
    return Arm(
        place.spec,
        Dictionary.load(folder / "sae"),
        BatchTopK.load(meta) if (meta := folder / "meta").exists() else None,
        pd.read_csv(folder / "history.csv", dtype=HISTORY),
        folder,
    )


def _train_missing(run: Run, places: list[_Place], watch: Watch | None) -> None:
    missing = [place for place in places if not place.result.complete]
    distributed.barrier()  # all have looked before the first is finished
    for place in missing:
        if place.spec.kind in run.profile.training.given and distributed.rank() == 0:
            _save(run.profile, place, load_given(run.profile, place.spec.kind))
    missing = [place for place in missing if place.spec.kind not in run.profile.training.given]
    distributed.barrier()
    if not missing:
        return
    stream: BatchStream | SampleStream = (
        SampleStream(run) if run.profile.synthetic else BatchStream(run)
    )
    if run.profile.activations.cache or run.profile.synthetic:
        stream.residuals.fill()
        release_subject(run)  # its memory is for the arms
    device = compute_device(run.profile)
    for group in _groups(run.profile, missing, stream.residuals.d, device):
        mine = group[distributed.rank() :: distributed.world_size()]
        _train_group(run, mine, stream, device, watch)
        distributed.barrier()


def _train_group(
    run: Run,
    places: list[_Place],
    stream: BatchStream | SampleStream,
    device: torch.device,
    watch: Watch | None,
) -> None:
    """Train arms side by side: each batch is read once and given to all that are at its step."""
    steps, training = run.profile.steps, run.profile.training
    matrices, trainers = Workspace(), []
    for place in places:
        trainer = Trainer(place.spec, run.profile, stream.residuals.d, device, matrices)
        if path := latest_checkpoint(place.state.folder, steps):
            restore_checkpoint(trainer, path, place.state.key)
        trainers.append((place, trainer))
    seen = {place.spec: (place.spec.order, _start(run.profile, place.spec)) for place in places}
    starts = {name: Start.of(name, _seen(run, stream.residuals.chunk(0), device))
              for name in {start for _, start in seen.values()} - {"zeros"}}  # fmt: skip
    # Processes that share residuals walk through the text together.
    first = distributed.least(min((trainer.step_count for _, trainer in trainers), default=steps))
    arms = places[0].spec.name if len(places) == 1 else f"{len(places)} arms"
    with progress(steps * training.batch_tokens, f"training {arms}") as bar:
        bar.update(first * training.batch_tokens)
        for step in range(first, steps):
            active = [(place, trainer) for place, trainer in trainers if trainer.step_count == step]
            batches = {
                order: _seen(run, stream.batch(step, order), device)
                for order in {place.spec.order for place, _ in active} or {0}
            }
            inputs = {
                (order, name): starts[name].apply(batches[order])
                if name in starts
                else batches[order]
                for order, name in {seen[place.spec] for place, _ in active}
            }
            losses = [trainer.step(inputs[seen[place.spec]]) for place, trainer in active]
            bar.update(training.batch_tokens)
            if (step + 1) % HISTORY_EVERY == 0 and active:
                bar.set_postfix_str(_state_line(losses))
                if watch is not None:
                    for place, trainer in active:
                        watch(place.spec.name, trainer.last_row())
            if (step + 1) % training.checkpoint_every == 0 and step + 1 < steps:
                for place, trainer in active:
                    save_checkpoint(trainer, place.state.folder, place.state.key, False)
    for place, trainer in trainers:
        save_checkpoint(trainer, place.state.folder, place.state.key, True)
        _save_result(run.profile, place, trainer, starts.get(seen[place.spec][1]))


def _state_line(losses: Sequence[Losses]) -> str:
    """The arms' losses in a few words: the range of L2, and the most dead features."""
    l2 = [loss.l2.item() for loss in losses]
    span = f"{min(l2):.4f}" if len(l2) == 1 else f"{min(l2):.4f}–{max(l2):.4f}"
    l0 = max(float(loss.l0) for loss in losses)
    return f"L2 {span}, L0 ≤ {l0:.1f}, dead ≤ {max(int(loss.dead) for loss in losses)}"


def _seen(run: Run, x: Tensor, device: torch.device) -> Tensor:
    """What training sees of raw inputs (b, d): samples of a synthetic world as they are."""
    x = x.to(device, torch.float32)
    return x if run.profile.synthetic else normalise(x)[0]


def described(profile: Profile, arm: str) -> dict[str, Any]:
    """What SAELens asks of a dictionary's metadata."""
    about: dict[str, Any] = {"model_name": profile.model.source, "arm": arm}
    if not profile.synthetic:
        about |= {
            "hook_name": f"blocks.{profile.model.layer}.hook_resid_pre",
            "context_size": profile.text.context_length,
            "prepend_bos": profile.text.bos == "every_row",
        }
    return about


def _save_result(profile: Profile, place: _Place, trainer: Trainer, start: Start | None) -> None:
    sae = trainer.primary.sae
    if profile.synthetic:
        sae.space = "none"
    if trainer.meta is not None:
        trainer.meta.sae.save(place.result.folder / "meta")
    _save(profile, place, sae if start is None else start.fold(sae), trainer)


def _save(profile: Profile, place: _Place, sae: Dictionary, trainer: Trainer | None = None) -> None:
    """Finish an arm; one that is given has no history."""
    folder = place.result.folder
    sae.save(folder / "sae", described(profile, place.spec.name))
    with atomic_write(folder / "history.csv") as path:
        history = trainer.history() if trainer else pd.DataFrame(columns=list(HISTORY))
        history.to_csv(path, index=False)
    place.result.finish({"seconds": trainer.seconds} if trainer else {})


def _groups(
    profile: Profile, places: list[_Place], d_in: int, device: torch.device
) -> Iterator[list[_Place]]:
    """Arms that fit in memory together, in order, dealt out to the processes of a launcher.

    TrainingError if one arm alone does not fit.
    """
    on_gpu = device.type == "cuda"
    # Processes without a GPU share one memory.
    sharing = 1 if on_gpu else distributed.world_size()
    free = distributed.least(free_memory(device) // sharing)
    budget = MEMORY_SHARE * free - step_bytes(profile, d_in, on_gpu)
    group: list[_Place] = []
    held = [0] * distributed.world_size()
    for place in places:
        size = arm_bytes(profile, d_in, place.spec, on_gpu)
        if size > budget:
            raise TrainingError(_too_large(profile, d_in, place.spec, free, on_gpu))
        if held[len(group) % len(held)] + size > budget:
            yield group
            group, held = [], [0] * len(held)
        held[len(group) % len(held)] += size
        group.append(place)
    if group:
        yield group


def _too_large(profile: Profile, d_in: int, spec: ArmSpec, free: int, on_gpu: bool) -> str:
    """Why an arm cannot be trained here, and the largest sizes that could be."""

    def need(smaller: Profile) -> float:
        held = arm_bytes(smaller, d_in, spec, on_gpu) + step_bytes(smaller, d_in, on_gpu)
        return held / MEMORY_SHARE

    fitting = []
    for section, key in (("training", "batch_tokens"), ("dictionary", "n_features")):
        sizes = getattr(profile, section)
        size = getattr(sizes, key)
        for half in (size >> i for i in range(1, size.bit_length())):
            smaller = sizes.model_copy(update={key: half})
            if need(profile.model_copy(update={section: smaller})) <= free:
                fitting.append(f"{section}.{key} {half:,}")
                break
    return (
        f"arm {spec.name} needs {need(profile) / 2**30:.1f} GiB of free memory and "
        f"{free / 2**30:.1f} are there: "
    ) + (" or ".join(fitting) + " would fit" if fitting else "use a larger machine")
