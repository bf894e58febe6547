"""The paper's 17 arms from one stream over 17 single runs, the language model's pass included.

    make bench BENCH=stream

Measured on a real model with the proportions of the paper: SmolLM2-135M at layer 17 of 30,
n = 16 d, n/11.4 meta features, k = d/20, batches of 4,096 tokens, meta phases 10:5. Its pass costs
11 times the encoder's product, that of GPT-2 large at layer 20 15 times: the proportion here is the
harder one. The stream is run with all arms; a single run is run once for each kind of arm, with a
pass of its own. Loading the model is left out of both.

Then the same for the real shape, as arithmetic from parts measured here: 20 blocks of GPT-2 large
with random weights, one solo and ten joint steps at d 1280, n 20,480, k 64, batch 4,096.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2Model

from metasae_lib import Profile, Run
from metasae_lib.study.arms import ArmSpec
from metasae_lib.subject.activations import BatchStream
from metasae_lib.subject.model import Subject, compute_device, load_subject
from metasae_lib.train.dictionary import normalise
from metasae_lib.train.replay import Workspace
from metasae_lib.train.trainer import Trainer

SOLO, CONTROL, JOINT = (
    ArmSpec("solo", 0),
    ArmSpec("control", 0, 0.0, 1.0),
    ArmSpec("joint", 0, 0.3, 1.0),
)
PAPER = {SOLO: 5, CONTROL: 3, JOINT: 9}  # the baseline and four seeds; one a bandwidth; the grid
SIZES = {
    "text.roles": {"train": 100_000, "calibration": 10_000, "scan": 10_000, "contexts": 10_000},
    "activations": {"cache": False, "chunk_rows": 33},  # about a batch
    "dictionary": {"n_features": 9216, "k": 29, "n_meta_features": 810, "meta_k": 8},
    "training.arms": ["solo", "joint", "control"],
    "training.batch_tokens": 4096,
    "training.n_primary_steps": 10,
    "training.n_meta_steps": 5,
}
REAL = {"n_features": 20480, "k": 64, "n_meta_features": 1800, "meta_k": 8}
REAL_D, REAL_BLOCKS, CONTEXT = 1280, 20, 128


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(run: Run, subject: Subject, arms: Sequence[ArmSpec], steps: int) -> tuple[float, float]:
    """Seconds of the language model with the stream, and of the arms, for some steps."""
    device, matrices, profile = compute_device(run.profile), Workspace(), run.profile
    trainers = [Trainer(arm, profile, subject.d_model, device, matrices) for arm in arms]
    stream = BatchStream(run, subject)
    model = training = 0.0
    for step in range(steps):
        started = time.perf_counter()
        z = normalise(stream.batch(step).to(device, torch.float32))[0]
        synchronise(device)
        ready = time.perf_counter()
        for trainer in trainers:
            trainer.step(z)
        synchronise(device)
        model += ready - started
        training += time.perf_counter() - ready
    return model, training


def step_seconds(profile: Profile, arm: ArmSpec, steps: int) -> float:
    """Mean seconds of a step at the real sizes, on random inputs, after one to warm up."""
    device = compute_device(profile)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(profile.training.batch_tokens, REAL_D, generator=generator).to(device)
    trainer = Trainer(arm, profile, REAL_D, device)
    trainer.step(z)
    trainer.step_count = 0  # so that the meta phase lies within the timed steps
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step(z)
    synchronise(device)
    return (time.perf_counter() - started) / steps


def pass_seconds(device: torch.device, rows: int) -> float:
    """Seconds a token of GPT-2 large's first blocks, random weights of the real shape."""
    config = GPT2Config(n_embd=REAL_D, n_layer=REAL_BLOCKS, n_head=20)
    model = GPT2Model(config).to(device, torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (rows, CONTEXT), device=device)
    with torch.no_grad():
        model(ids)
        synchronise(device)
        started = time.perf_counter()
        model(ids)
        synchronise(device)
    return (time.perf_counter() - started) / ids.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="a multiple of 10: whole phases")
    steps = parser.parse_args().steps
    profile = Profile.load("smollm2-135m", SIZES)
    device, subject = compute_device(profile), load_subject(profile)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(profile, folder)
        train(run, subject, [JOINT], 1)  # compiles
        alone = {arm: train(run, subject, [arm], steps) for arm in PAPER}
        arms = [arm for arm, count in PAPER.items() for _ in range(count)]
        model, training = train(run, subject, arms, steps)
    print(f"SmolLM2-135M, d {subject.d_model}, {SIZES['dictionary']}, {steps} steps, {device}")
    for arm, (pass_, step) in alone.items():
        print(f"one {arm.kind:8} alone: model pass {pass_:6.1f} s, training {step:6.1f} s")
    print(f"17 arms from one stream: model pass {model:6.1f} s, training {training:6.1f} s")
    singles = sum(count * sum(alone[arm]) for arm, count in PAPER.items())
    share = (model + training) / singles
    print(f"17 single runs: {singles:.1f} s; one stream takes {share:.2f} of that (goal: 0.33)")

    profile = Profile.load("smollm2-135m", SIZES | {"dictionary": REAL})
    batch = profile.training.batch_tokens
    whole = pass_seconds(device, 8) * batch
    solo, joint = step_seconds(profile, SOLO, 2), step_seconds(profile, JOINT, 10)
    # A control needs less than a joint arm: its meta dictionary learns, but does not pull.
    together = 5 * solo + 12 * joint
    print(f"\nGPT-2 large's shape, seconds a batch of {batch}, {device}:")
    print(f"model pass {whole:.2f}, solo step {solo:.2f}, joint step {joint:.2f}")
    print(
        f"({whole:.2f} + 5 · {solo:.2f} + 12 · {joint:.2f}) / (17 · {whole:.2f} + 5 · {solo:.2f} + "
        f"12 · {joint:.2f}) = {(whole + together) / (17 * whole + together):.2f}"
    )
    print(f"ratio: {1 / share:.2f}")


if __name__ == "__main__":
    main()
