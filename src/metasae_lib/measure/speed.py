"""How long this machine takes for the units of a plan: a few of each, at a profile's own sizes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from metasae_lib.measure.fidelity import MODES, reconstruct
from metasae_lib.measure.passes import GROUP, pre_activations
from metasae_lib.measure.scan import ArmScan
from metasae_lib.measure.thresholds import Calibrator
from metasae_lib.study import ArmSpec, Profile, Run
from metasae_lib.study.known import ModelShape
from metasae_lib.study.plan import Costs, fitting_machines, machines
from metasae_lib.subject.head import Head
from metasae_lib.subject.model import compute_device, load_subject
from metasae_lib.train import Arm, normalise
from metasae_lib.train.learner import Learner
from metasae_lib.train.trainer import Trainer

_REPEATS = 3  # of a unit, after a first call that warms up
_DEAD = 0.2  # of the features, as on average over a training of the default profile


def measured_costs(profile: Profile, shape: ModelShape) -> Costs:
    """The costs of a profile's units on this machine, measured on random numbers.

    The language model is the profile's own, or for one of a hub random blocks with as many weights;
    its dictionaries are untrained.
    Takes seconds, up to minutes for the shapes of large models on a CPU; ProfileError before that
    where the memory does not hold one arm.
    """
    device = compute_device(profile)
    here = machines()["cpu"]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        here = replace(here, memory=memory, gpu=True)
    fitting_machines(profile, {"here": here})  # raises
    block, head = (each(profile, shape, device) for each in (_block, _head))
    solo, joint = _steps(profile, shape, device)
    return Costs(block, head, solo, joint, *_passes(profile, shape, device), here.memory, here.gpu)


def _seconds(unit: Callable[[], object]) -> float:
    """Of one call, the mean of a few."""
    unit()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        unit()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / _REPEATS


def _block(profile: Profile, shape: ModelShape, device: torch.device) -> float:
    """Seconds of a token in one block: of the model itself, or of random ones for a hub model."""
    size = profile.model.batch_rows, profile.text.context_length
    if not profile.model.source.startswith("hub:"):
        subject = load_subject(profile)
        ids = np.random.default_rng(0).integers(shape.vocabulary, size=size)
        return _seconds(lambda: subject.residuals(ids)) / profile.model.layer / ids.size
    from transformers import LlamaConfig, LlamaModel

    d, n_blocks = shape.d_model, 2
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=max(1, round((shape.block_parameters - 4 * d * d) / (3 * d))),
        num_hidden_layers=n_blocks,
        num_attention_heads=math.gcd(d, d // 64 or 1),
        vocab_size=8,
        use_cache=False,
    )
    dtype: torch.dtype = getattr(torch, profile.model.dtype)
    model: Any = LlamaModel(config)
    model.to(device, dtype)
    hidden = torch.randn(*size, d, dtype=dtype, device=device)
    with torch.no_grad():
        return _seconds(lambda: model(inputs_embeds=hidden)) / n_blocks / math.prod(size)


def _head(profile: Profile, shape: ModelShape, device: torch.device) -> float:
    """Seconds of a token's cross-entropy from its last hidden state, with random weights."""
    from transformers import LlamaConfig

    dtype: torch.dtype = getattr(torch, profile.model.dtype)
    tokens = profile.model.batch_rows * profile.text.context_length
    hidden = torch.randn(tokens, shape.d_model, dtype=dtype, device=device)
    weights = torch.randn(shape.vocabulary, shape.d_model, dtype=dtype, device=device)
    made = Head(lambda x: x @ weights.T, LlamaConfig())
    part = made.blocks(hidden, shape.vocabulary)[0]
    target = torch.zeros(len(part), dtype=torch.int64, device=device)
    return _seconds(lambda: F.cross_entropy(made(part), target)) / len(part)


def _steps(profile: Profile, shape: ModelShape, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step, solo and joint (with its part of a meta phase)."""
    training, seed = profile.training, profile.training.seeds[0]
    z = normalise(torch.randn(training.batch_tokens, shape.d_model, device=device))[0]

    def step(spec: ArmSpec) -> float:
        trainer = Trainer(spec, profile, shape.d_model, device)
        trainer.phases = 10**9, 0  # a meta step is timed by itself
        _let_die(trainer.primary, training.dead_after)
        seconds = _seconds(lambda: trainer.step(z))
        if (meta := trainer.meta) is None:
            return seconds
        rows = normalise(trainer.primary.W_dec)[0]
        share = training.n_meta_steps / training.n_primary_steps
        return seconds + share * _seconds(lambda: meta.step(rows))

    return step(ArmSpec("solo", seed)), step(ArmSpec("joint", seed, *profile.selected))


def _let_die(learner: Learner, dead_after: int) -> None:
    """Make some features too weak to be selected, so that AuxK has its part of a step."""
    state = learner.state()
    dead = int(_DEAD * len(state["silent"]))
    state["W_enc_T"][:dead] *= 1e-3
    state["silent"][:dead] = dead_after
    learner.restore(state)


def _passes(
    profile: Profile, shape: ModelShape, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of a token of one arm in calibration, in the scan, and reconstructed in each mode."""
    spec = ArmSpec("solo", profile.training.seeds[0])
    sae = Trainer(spec, profile, shape.d_model, device).primary.sae
    batch = profile.training.batch_tokens
    n_tokens = batch * max(1, GROUP // batch)
    z = normalise(torch.randn(n_tokens, shape.d_model, device=device))[0]
    dtype: torch.dtype = getattr(torch, profile.training.dtype)
    calibrator = Calibrator(sae.n_features, sae.k)

    def calibrate() -> None:
        for pre in pre_activations(sae, z, dtype).split(batch):
            calibrator.update(pre)

    calibration = _seconds(calibrate) / n_tokens
    calibration += _seconds(calibrator.result) / calibrator.n_tokens  # it sorts what was kept
    found = calibrator.result()
    sae.threshold = found.threshold(profile.evaluation.threshold_rule).to(device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(profile, folder)
        arm = Arm(spec, sae, None, pd.DataFrame(), Path(folder))
        scan = ArmScan(run, arm, found, run.artefact("counts", {}))
        scanned = _seconds(lambda: scan.add(pre_activations(sae, z, dtype)))
    both = _seconds(
        lambda: [reconstruct(sae, part, mode, dtype) for part in z.split(batch) for mode in MODES]
    )
    return calibration, scanned / n_tokens, both / n_tokens
