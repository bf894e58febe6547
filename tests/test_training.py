"""Hand-written gradients against float64 autograd; equal arms, exact resume, clear errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from small_models import save_model, save_text, small_profile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metasae_lib import Profile, Run
from metasae_lib.__main__ import main
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import ArtefactError, TrainingError
from metasae_lib.train import kernels, training
from metasae_lib.train import trainer as training_loop
from metasae_lib.train.dictionary import BatchTopK, JumpReLU, denormalise, normalise
from metasae_lib.train.kernels.common import Pull
from metasae_lib.train.learner import JumpReLULearner, Learner, Losses, Settings
from metasae_lib.train.penalty import decomposability_penalty, orthogonality, penalty_pull
from metasae_lib.train.replay import Replay
from metasae_lib.train.start import Start
from metasae_lib.train.trainer import HISTORY_EVERY, Trainer

D = 24


class Stream:
    """Stands for activations.BatchStream: sparse sums of fixed directions, by step alone."""

    def __init__(self, run: Run) -> None:
        self.residuals = Residuals(run, "train")
        self.b = run.profile.training.batch_tokens
        self.atoms = torch.randn(60, D, generator=torch.Generator().manual_seed(5))

    def batch(self, step: int, order: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step + 10**6 * order)
        weights = torch.rand(self.b, 60, generator=generator)
        weights = weights * (torch.rand(self.b, 60, generator=generator) < 0.06)
        noise = torch.randn(self.b, D, generator=generator) / 20
        return weights @ self.atoms + noise


class Residuals:
    """Stands for activations.Residuals."""

    d, inputs = D, ("synthetic",)

    def __init__(self, run: Run, role: str) -> None: ...

    def fill(self) -> None: ...

    def chunk(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(300, D, generator=generator) + torch.linspace(-1, 1, D)


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BatchStream", Stream)
    monkeypatch.setattr(training, "Residuals", Residuals)


SMALL = {
    "dictionary.n_features": 96,
    "dictionary.k": 4,
    "dictionary.n_meta_features": 12,
    "dictionary.meta_k": 2,
    "training.batch_tokens": 64,
    "training.train_tokens": 64 * 60,
    "training.k_aux": 16,
    "training.checkpoint_every": 7,
    "training.seeds": [0],
    "training.arms": ["solo", "joint", "control"],
}


def small(**overrides: object) -> Profile:
    return Profile.load("tiny", SMALL | {k.replace("__", "."): v for k, v in overrides.items()})


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


# --------------------------------------------------------------------------- gradients


def reconstruction_loss(sae: BatchTopK, x: Tensor, acts: Tensor, prefixes: list[int]) -> Tensor:
    """Mean over prefixes of the L2 of what their features rebuild alone."""
    features = torch.arange(sae.n_features)
    alone = [acts * (features < m) for m in prefixes or [sae.n_features]]
    return torch.stack([(x - sae.decode(some)).square().mean() for some in alone]).mean()


@pytest.mark.parametrize("form", [kernels.compiled, kernels.plain])
@pytest.mark.parametrize("n_dead", [0, 3, 40])
@pytest.mark.parametrize(("lambda2", "prefixes"), [(None, []), (0.3, []), (None, [2, 50, 96])])
def test_gradients_agree_with_float64_autograd(
    form: ModuleType, n_dead: int, lambda2: float | None, prefixes: list[int]
) -> None:
    """Eq. 3 with AuxK, written plainly, differentiated by autograd in float64."""
    b, d, n, k, k_aux, weight = 50, 24, 96, 5, 8, 1 / 32
    generator = torch.Generator().manual_seed(n_dead)
    sae = BatchTopK(d, n, k, seed=1)
    sae.b_dec.data += torch.randn(d, generator=generator) / 5
    settings = Settings(
        3e-4, dtype=torch.float32, k_aux=k_aux, aux_weight=weight, dead_after=1, prefixes=prefixes
    )
    # Silent features: far enough below the others that the batch does not select them.
    sae.W_enc.data[:, :n_dead] *= 1e-2
    z = normalise(torch.randn(b, d, generator=generator))[0]
    W_hat = torch.randn(n, d, generator=generator) / 5

    exact = BatchTopK(d, n, k, seed=1).double().requires_grad_()
    exact.W_enc.data.copy_(sae.W_enc)
    exact.b_dec.data.copy_(sae.b_dec)
    exact.W_dec.data.copy_(sae.W_dec)
    x = z.double()
    acts = exact.encode(x)
    error = x - exact.decode(acts)
    loss = reconstruction_loss(exact, x, acts, prefixes)
    dead = (acts == 0).all(0).nonzero()[:, 0]
    assert len(dead) >= n_dead
    aux = torch.zeros(())
    if len(dead):
        pre = exact.pre_activations(x)[:, dead].relu()
        kept = torch.zeros_like(pre).scatter(1, pre.topk(min(k_aux, len(dead)), 1).indices, 1.0)
        aux = (error.detach() - (pre * kept) @ exact.W_dec[dead]).square().mean()
        loss = loss + weight * aux
    pull = None
    if lambda2 is not None:
        loss = loss + lambda2 * decomposability_penalty(exact.W_dec, W_hat.double(), 1.0)
        difference = sae.W_dec - W_hat
        factor = penalty_pull(difference.square().sum(1), lambda2, 1.0)
        pull = Pull(difference, factor)
    loss.backward()
    assert exact.W_dec.grad is not None and exact.W_enc.grad is not None
    along = (exact.W_dec.grad * exact.W_dec).sum(1, keepdim=True) * exact.W_dec
    expected = (exact.W_enc.grad.T, (exact.W_dec.grad - along).detach(), exact.b_dec.grad)

    learner = Learner(sae, settings)
    learner.kernels = form
    losses = learner.step(z, pull)
    # After one step from zero the first moment is (1 - beta1) times the gradient.
    moments = (learner.rows.m_enc, learner.rows.m_dec, learner.moments_b[0])
    for moment, gradient in zip(moments, expected, strict=True):
        assert gradient is not None
        mine = moment.double() / 0.1
        assert (mine - gradient).norm() <= 1e-5 * gradient.norm()
    assert losses.l2.item() == pytest.approx(error.square().mean().item(), rel=1e-6)
    assert losses.aux.item() == pytest.approx(aux.item(), rel=1e-5)
    assert losses.dead == len(dead)


class Rectangle(torch.autograd.Function):
    """1 where pre > θ; its derivative by θ is that of a ramp of width `width` (in float64)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor, None]:
        pre, theta = ctx.saved_tensors
        window = ((pre - theta).abs() < ctx.width / 2).to(pre.dtype)
        return None, (-window / ctx.width * grad[0]).sum(0), None


@pytest.mark.parametrize("form", [kernels.compiled, kernels.plain])
def test_jumprelu_gradients_agree_with_float64_autograd(form: ModuleType) -> None:
    """L2 and (L0/k - 1)², with the rectangle's derivative, written plainly."""
    b, d, n, k = 60, 24, 96, 5
    sae = JumpReLU(d, n, k, seed=1)
    settings = Settings(3e-4, dtype=torch.float32, aux_weight=0.0, jumprelu_bandwidth=0.05)
    learner = JumpReLULearner(sae, settings)
    learner.kernels, learner.step_count = form, 1  # not the first: thresholds are there
    generator = torch.Generator().manual_seed(4)
    sae.threshold.copy_(0.7 + 0.4 * torch.rand(n, generator=generator))
    z = normalise(torch.randn(b, d, generator=generator))[0]

    W_enc, W_dec = (w.detach().double().requires_grad_() for w in (sae.W_enc, sae.W_dec))
    b_dec = sae.b_dec.detach().double().requires_grad_()
    theta = sae.threshold.double().requires_grad_()
    pre = (z.double() - b_dec) @ W_enc
    step: Tensor = Rectangle.apply(pre, theta, learner.width)  # type: ignore[assignment]
    # The gate passes the value of pre where it is open, and moves with θ at height θ.
    acts = pre * step.detach() + theta.detach() * (step - step.detach())
    l0 = step.sum() / b
    l2 = (z.double() - acts @ W_dec - b_dec).square().mean()
    (l2 + (l0 / k - 1) ** 2).backward()
    assert W_dec.grad is not None and W_enc.grad is not None and theta.grad is not None
    along = (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec

    losses = learner.step(z)
    moments = (learner.rows.m_enc, learner.rows.m_dec, learner.moments_b[0])
    expected = (W_enc.grad.T, (W_dec.grad - along).detach(), b_dec.grad)
    for moment, gradient in zip(moments, expected, strict=True):
        assert gradient is not None
        assert (moment.double() / 0.1 - gradient).norm() <= 1e-5 * gradient.norm()
    mine = learner.moments_t[0].double() / 0.1 / d**0.5
    assert theta.grad.count_nonzero() > 20
    assert (mine - theta.grad).norm() <= 1e-5 * theta.grad.norm()
    assert float(losses.l0) == pytest.approx(l0.item())
    assert losses.l2.item() == pytest.approx(l2.item(), rel=1e-6)


def test_as_released_residual_is_no_constant() -> None:
    """AuxK's gradient through e, by autograd; rows are unit before the step and drift after it."""
    b, d, n, k, weight = 50, 24, 96, 5, 0.5
    sae = BatchTopK(d, n, k, seed=1)
    sae.W_enc.data[:, :20] *= 1e-2  # silent
    settings = Settings(
        1e-2, dtype=torch.float32, k_aux=8, aux_weight=weight, dead_after=1, as_released=True
    )
    z = normalise(torch.randn(b, d, generator=torch.Generator().manual_seed(2)))[0]
    exact = BatchTopK(d, n, k, seed=1).double().requires_grad_()
    exact.W_enc.data.copy_(sae.W_enc)
    exact.W_dec.data.copy_(sae.W_dec)
    acts = exact.encode(z.double())
    error = z.double() - exact.decode(acts)
    dead = (acts == 0).all(0).nonzero()[:, 0]
    pre = exact.pre_activations(z.double())[:, dead].relu()
    kept = torch.zeros_like(pre).scatter(1, pre.topk(8, 1).indices, 1.0)
    aux = (error - (pre * kept) @ exact.W_dec[dead]).square().mean()
    (error.square().mean() + weight * aux).backward()
    grad, rows = exact.W_dec.grad, exact.W_dec.detach()
    assert grad is not None and exact.W_enc.grad is not None and exact.b_dec.grad is not None
    learner = Learner(sae, settings)
    learner.step(z)
    projected = grad - (grad * rows).sum(1, keepdim=True) * rows
    for moment, gradient in (
        (learner.rows.m_enc, exact.W_enc.grad.T),
        (learner.rows.m_dec, projected),
        (learner.moments_b[0], exact.b_dec.grad),
    ):
        assert (moment.double() / 0.1 - gradient).norm() <= 1e-5 * gradient.norm()
    drift = (learner.W_dec.norm(dim=1) - 1).abs()
    assert 1e-4 < drift.max() < 0.05
    torch.testing.assert_close(
        learner.W_dec.double(), rows - 1e-2 * projected / (projected.abs() + 1e-8),
        rtol=0, atol=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("prefixes", [[], [3, 20, 40]])
def test_a_run_of_steps_is_that_of_torch_optim_adam(prefixes: list[int]) -> None:
    """Thirty steps beside autograd, torch's Adam, and unit rows by projection, in float64."""
    sae, peer = BatchTopK(16, 40, 3, seed=2), BatchTopK(16, 40, 3, seed=2).double()
    peer.requires_grad_()
    settings = Settings(1e-3, dtype=torch.float32, aux_weight=0.0, prefixes=prefixes)
    learner = Learner(sae, settings)
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        z = torch.randn(32, 16, generator=generator)
        learner.step(z)
        optimiser.zero_grad()
        reconstruction_loss(peer, z.double(), peer.encode(z.double()), prefixes).backward()
        with torch.no_grad():
            grad, rows = peer.W_dec.grad, peer.W_dec
            assert grad is not None
            grad -= (grad * rows).sum(1, keepdim=True) * rows
            optimiser.step()
            rows /= rows.norm(dim=1, keepdim=True)
    for mine, exact in zip(sae.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=0, atol=2e-5)


def test_bfloat16_products_stay_near_float32_ones() -> None:
    z = normalise(torch.randn(256, 32, generator=torch.Generator().manual_seed(0)))[0]
    moments = []
    for dtype in (torch.float32, torch.bfloat16):
        learner = Learner(BatchTopK(32, 128, 8), Settings(1e-3, dtype=dtype, dead_after=1))
        learner.step(z)
        moments.append(learner.rows[2:])
        assert learner.W_dec.dtype == learner.rows.m_enc.dtype == torch.float32
        assert torch.equal(learner._low, learner.W_enc_T.to(dtype))
    for full, low in zip(*moments, strict=True):
        assert (full - low).norm() < 0.1 * full.norm()


def test_penalty_is_that_of_the_denormalised_reconstruction() -> None:
    profile = small(training__dtype="float32")
    trainer = Trainer(ArmSpec("joint", 0, 0.3, 0.5), profile, D, torch.device("cpu"))
    assert trainer.meta is not None
    pull, penalty = trainer._pull()
    W = trainer.primary.W_dec.double().requires_grad_()
    rows, mean, std = normalise(W.detach())
    meta = trainer.meta.sae.double()
    W_hat = denormalise(meta.decode(meta.encode(rows)), mean, std)
    value = decomposability_penalty(W, W_hat, 0.5)
    (0.3 * value).backward()
    assert float(penalty) == pytest.approx(value.item(), rel=1e-5)
    mine = pull.scale[:, None] * pull.direction
    torch.testing.assert_close(mine.double(), W.grad, rtol=1e-4, atol=1e-9)


# --------------------------------------------------------------------------- arms


@pytest.mark.usefixtures("synthetic")
def test_arms_train_and_the_control_is_the_solo_arm(tmp_path: Path) -> None:
    arms = training.train_arms(Run.open(small(), tmp_path))
    assert list(arms) == ["solo-seed0", "joint-lambda0.3-sigma1-seed0", "control-sigma1-seed0"]
    solo, joint, control = arms.values()
    for mine, other in zip(solo.sae.parameters(), control.sae.parameters(), strict=True):
        assert mine.detach().numpy().tobytes() == other.detach().numpy().tobytes()
    assert not torch.equal(solo.sae.W_dec, joint.sae.W_dec)
    assert solo.meta is None and control.meta is not None and joint.meta is not None
    for arm in arms.values():
        assert arm.history["l2"].iloc[-1] < 0.9 * arm.history["l2"].iloc[0]
        torch.testing.assert_close(arm.sae.W_dec.norm(dim=1), torch.ones(96))
        assert (arm.history["l0"] == 4).all()
        assert arm.history["step"].tolist() == list(range(10, 61, 10))
    assert joint.history["penalty"].iloc[-1] < control.history["penalty"].iloc[-1]
    assert joint.history["meta_l2"].notna().all()


@pytest.mark.usefixtures("synthetic")
def test_every_kind_of_arm(tmp_path: Path) -> None:
    """Each is trained, is what its name says, and differs from the solo arm."""
    kinds = ["solo", "joint", "ablation", "ortsae", "matryoshka", "as-released", "critic",
             "frontier"]  # fmt: skip
    profile = small(
        training__arms=kinds, training__lambda2=[30.0], training__seeds=[0, 1],
        training__order="by_seed", training__frontier=[3], training__seeds_frontier=2,
    )  # fmt: skip
    arms = training.train_arms(Run.open(profile, tmp_path))
    assert list(arms) == [
        "solo-seed0", "solo-seed1", "joint-lambda30-sigma1-seed0",
        "joint-lambda30-sigma1-seed1", "jumprelu-seed0", "jumprelu-lambda30-sigma1-seed0",
        "jumprelu-k2-seed0", "jumprelu-k2-lambda30-sigma1-seed0", "batchtopk-k2-seed0",
        "batchtopk-k2-lambda30-sigma1-seed0", "ortsae-seed0", "matryoshka-seed0",
        "as-released-seed0", "as-released-lambda30-sigma1-seed0",
        "critic-k1-lambda30-sigma1-seed0", "critic-steps100to10-lambda30-sigma1-seed0",
        "frontier-k3-seed0", "frontier-k3-seed1",
    ]  # fmt: skip
    solo = arms.pop("solo-seed0")
    for name, arm in arms.items():
        assert not torch.equal(arm.sae.W_dec, solo.sae.W_dec), name
        assert (arm.meta is not None) == arm.spec.has_meta
        assert isinstance(arm.sae, JumpReLU if "jumprelu" in name else BatchTopK)
        assert arm.history["l2"].iloc[-1] < arm.history["l2"].iloc[0]
    last = {name: arm.history.iloc[-1] for name, arm in arms.items()}
    assert last["ortsae-seed0"].penalty < orthogonality(solo.sae.W_dec, 96)[0]
    assert last["batchtopk-k2-seed0"].l0 == 2
    assert 2 < last["jumprelu-seed0"].l0 < 8 and last["jumprelu-k2-seed0"].l0 < 4
    # Less of each input is told by fewer features, from the same start.
    assert last["frontier-k3-seed0"].l2 > solo.history["l2"].iloc[-1]
    assert last["frontier-k3-seed0"].l0 == 3 and "frontier-k3-seed1" in arms
    # A Matryoshka dictionary pays in the whole for what each of its prefixes rebuilds alone.
    z = normalise(Stream(Run.open(profile, tmp_path)).batch(1000))[0]
    saes = [sae for sae in (arms["matryoshka-seed0"].sae, solo.sae) if isinstance(sae, BatchTopK)]
    for m in (3, 9, 21, 45, 96):
        nested, plain = (reconstruction_loss(sae, z, sae.encode(z), [m]) for sae in saes)
        assert (nested < plain) == (m < 96)


@pytest.mark.usefixtures("synthetic")
def test_one_prefix_of_all_features_is_the_solo_arm(tmp_path: Path) -> None:
    profile = small(training__arms=["solo", "matryoshka"], training__matryoshka_prefixes=[1.0])
    solo, matryoshka = training.train_arms(Run.open(profile, tmp_path)).values()
    for mine, other in zip(matryoshka.sae.parameters(), solo.sae.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["zeros", "mean", "standard"])
def test_a_folded_dictionary_reads_plain_inputs(name: Any, tmp_path: Path) -> None:
    """What it makes of z is what the trained one makes of its inputs, mapped back."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(200, D, generator=generator) * torch.logspace(-1, 1, D) + 5
    start = Start.of(name, z)
    sae = BatchTopK(D, 96, 4, 1)
    sae.b_dec.data = torch.randn(D, generator=generator)
    sae.threshold = torch.rand(96, generator=generator)
    start.fold(sae).save(tmp_path)
    folded, inputs = BatchTopK.load(tmp_path), start.apply(z)
    assert torch.equal(inputs, z) == (name == "zeros")
    acts = sae.encode_threshold(inputs)
    torch.testing.assert_close(folded.encode_threshold(z), acts, rtol=1e-3, atol=1e-3)
    expected = sae.decode(acts) * start.scale + start.shift
    torch.testing.assert_close(folded.decode(acts), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.directions, sae.W_dec.data)
    torch.testing.assert_close(folded.directions.norm(dim=1), torch.ones(96))
    if name == "standard":
        assert inputs.std(dim=0).allclose(torch.ones(D)) and inputs.mean(0).abs().max() < 1e-4


def test_a_start_that_cannot_be_scaled_says_what_to_do() -> None:
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    z[:, 2] = 1.0
    Start.of("mean", z)
    with pytest.raises(TrainingError, match=r"set training\.start to mean"):
        Start.of("standard", z)


@pytest.mark.usefixtures("synthetic")
def test_starts_have_arms_of_their_own(tmp_path: Path) -> None:
    """The paper's start stays as an arm; with it, `training.start` changes no other key."""
    plain = training.train_arms(Run.open(small(), tmp_path))["solo-seed0"]
    kinds = ["solo", "joint", "zero-start"]
    arms = training.train_arms(
        Run.open(small(training__start="mean", training__arms=kinds), tmp_path)
    )
    assert torch.equal(arms["zero-start-seed0"].sae.W_dec, plain.sae.W_dec)
    assert not torch.equal(arms["solo-seed0"].sae.W_dec, plain.sae.W_dec)
    for name in ("solo-seed0", "joint-lambda0.3-sigma1-seed0"):
        lengths = arms[name].sae.W_dec.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert arms["solo-seed0"].folder != plain.folder


PEAK = """
import sys
import torch
from metasae_lib import Profile
from metasae_lib.study import ArmSpec, plan
from metasae_lib.train import normalise
from metasae_lib.train.trainer import Trainer

def memory(what):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

def train(n, d, tokens):
    sizes = {"n_features": n, "n_meta_features": n // 11, "k": 64, "meta_k": 8}
    training = {"batch_tokens": tokens, "n_primary_steps": 2, "n_meta_steps": 1, "dead_after": 2}
    training |= {"train_tokens": 10 * tokens, "k_aux": d // 2, "dtype": "bfloat16"}
    profile = Profile.load("tiny", {"dictionary": sizes, "training": training})
    spec = ArmSpec("solo", 0) if sys.argv[1] == "solo" else ArmSpec("joint", 0, *profile.selected)
    z = normalise(torch.randn(tokens, d))[0]
    trainer = Trainer(spec, profile, d, torch.device("cpu"))
    for _ in range(4):
        trainer.primary.silent.fill_(9)
        trainer.primary.W_enc_T[n // 20 :] = 0  # never fire
        trainer.primary._low[n // 20 :] = 0
        losses = trainer.step(z)
    assert losses.dead > 0.9 * n
    return plan.arm_bytes(profile, d, spec, False) + plan.step_bytes(profile, d, False)

train(256, 64, 256)  # everything is compiled
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
planned = train(8192, 1024, 2048)
print((memory("VmHWM") - before) / planned)
"""


@pytest.mark.parametrize("arm", ["solo", "joint"])
def test_training_takes_the_memory_that_is_planned(arm: str) -> None:
    """Of an arm nearly all of whose features are dead, which takes the most."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, arm], capture_output=True, text=True, check=True
    )
    assert 0.8 < float(done.stdout) < 1.2


@pytest.mark.usefixtures("synthetic")
def test_groups_and_added_arms_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = training.train_arms(Run.open(small(), tmp_path / "a"))
    monkeypatch.setattr(training, "arm_bytes", lambda *_: 2**62)
    with pytest.raises(TrainingError, match=r"needs .* GiB"):
        training.train_arms(Run.open(small(), tmp_path / "b"))
    calls = []
    monkeypatch.undo()
    monkeypatch.setattr(training, "BatchStream", Stream)
    monkeypatch.setattr(training, "Residuals", Residuals)
    train_group = training._train_group

    def one_by_one(run: Run, places: list, *rest: Any) -> None:
        calls.append(len(places))
        for place in places:
            train_group(run, [place], *rest)

    monkeypatch.setattr(training, "_train_group", one_by_one)
    training.train_arms(Run.open(small(training__arms=["solo"]), tmp_path / "b"))
    apart = training.train_arms(Run.open(small(), tmp_path / "b"))
    assert calls == [1, 2]  # the solo arm was there already
    for name, arm in together.items():
        assert weights(arm.folder) == weights(apart[name].folder)


@pytest.mark.usefixtures("synthetic")
def test_more_steps_continue_and_fewer_are_found(tmp_path: Path) -> None:
    short = Run.open(small(), tmp_path / "a")
    longer = small(training__train_tokens=64 * 95)
    before = {name: weights(arm.folder) for name, arm in training.train_arms(short).items()}
    continued = training.train_arms(Run.open(longer, tmp_path / "a"))
    direct = training.train_arms(Run.open(longer, tmp_path / "b"))
    for name, arm in continued.items():
        assert weights(arm.folder) == weights(direct[name].folder)
        columns = [column for column in arm.history if column != "seconds"]
        pd.testing.assert_frame_equal(arm.history[columns], direct[name].history[columns])
    assert {name: weights(a.folder) for name, a in training.load_arms(short).items()} == before


KILLED = """
import os, random, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from metasae_lib import Run
from metasae_lib.train import training
from test_training import RESUMED, Residuals, Stream, small
training.BatchStream, training.Residuals = Stream, Residuals
save, count = training.save_checkpoint, 0
def counted(*args):
    global count
    count += 1
    if count == int(sys.argv[3]):
        threading.Timer(random.random() / 20, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return save(*args)
training.save_checkpoint = counted
training.train_arms(Run.open(small(training__arms=RESUMED), Path(sys.argv[2])))
"""
RESUMED = ["solo", "joint", "matryoshka"]


@pytest.mark.usefixtures("synthetic")
def test_killed_and_resumed_to_the_bit(tmp_path: Path) -> None:
    profile = small(training__arms=RESUMED)
    whole = training.train_arms(Run.open(profile, tmp_path / "whole"))
    here = str(Path(__file__).parent)
    for at in (2, 5):
        command = [sys.executable, "-c", KILLED, here, str(tmp_path / "killed"), str(at)]
        assert subprocess.run(command, check=False).returncode == -9
    resumed = training.train_arms(Run.open(profile, tmp_path / "killed"))
    for name, arm in whole.items():
        assert weights(arm.folder) == weights(resumed[name].folder)


def test_processes_of_a_launcher_share_arms_and_text(tmp_path: Path) -> None:
    """torchrun with two processes and a stream that is not cached: the weights of one process."""
    model = save_model("llama", tmp_path / "model")
    profile = small_profile(
        model, save_text(tmp_path / "text.jsonl"), activations__cache=False,
        training__arms=["solo", "joint"],
    )  # fmt: skip
    alone = training.train_arms(Run.open(profile, tmp_path / "alone"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "metasae_lib", "train", "tiny", "--overrides", json.dumps(profile.overrides),
        "--runs-dir", str(tmp_path / "shared"), "--tensorboard", str(tmp_path / "board"),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    shared = training.load_arms(Run.open(profile, tmp_path / "shared"))
    assert list(shared) == list(alone)
    for name, arm in alone.items():
        assert weights(arm.folder) == weights(shared[name].folder)
        seen = EventAccumulator(str(tmp_path / "board" / name))
        seen.Reload()
        logged = [event.value for event in seen.Scalars("l2")]
        assert logged == pytest.approx(arm.history["l2"].tolist())


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["tiny", "--overrides", "{a: ["], "--overrides is not YAML"),
        (["tiny", "--overrides", "{training.lamda2: [1.0]}"], "nearest is training.lambda2"),
        (["tinny"], "the nearest is 'tiny'"),
    ):
        assert main(["train", *arguments]) == 2
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("synthetic")
@pytest.mark.parametrize("harm", ["cut", "foreign", "text"])
def test_a_bad_checkpoint_is_named_and_refused(tmp_path: Path, harm: str) -> None:
    profile = small(training__arms=["solo"])
    run = Run.open(profile, tmp_path / "runs")
    arm = training.train_arms(run)["solo-seed0"]
    place = training._places(run)[0]
    path = training_loop.latest_checkpoint(place.state.folder, 60)
    assert path is not None
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "text":
        path.write_text("not a checkpoint")
    else:
        trainer = Trainer(place.spec, profile, D, torch.device("cpu"))
        training_loop.save_checkpoint(trainer, tmp_path, "of another arm", False)
        (tmp_path / "checkpoint-0.safetensors").replace(path)
    for file in sorted(arm.folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    with pytest.raises(TrainingError, match=f"{path.name}.*(damaged|another arm).*delete it"):
        training.train_arms(run)


@pytest.mark.usefixtures("synthetic")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_residuals_name_arm_step_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    class Broken(Stream):
        def batch(self, step: int, order: int = 0) -> Tensor:
            x = super().batch(step)
            x[3, 2] = value if step == 12 else x[3, 2]
            return x

    monkeypatch.setattr(training, "BatchStream", Broken)
    with pytest.raises(TrainingError, match=r"arm solo-seed0, step 13, batch 12: the residuals"):
        training.train_arms(Run.open(small(), tmp_path))


@pytest.mark.usefixtures("synthetic")
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(small(training__arms=["solo"]), tmp_path)
    save_file, count = training_loop.save_file, 0

    def full(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(training_loop, "save_file", full)
    with pytest.raises(ArtefactError, match="disk is full"):
        training.train_arms(run)
    state = training._places(run)[0].state.folder
    assert training_loop.latest_checkpoint(state, 60) == state / "checkpoint-14.safetensors"


@pytest.mark.usefixtures("synthetic")
def test_missing_arms_are_named(tmp_path: Path) -> None:
    run = Run.open(small(), tmp_path)
    with pytest.raises(TrainingError, match=r"3 of 3 arms .*\(solo-seed0, joint"):
        training.load_arms(run)


def test_a_step_holds_no_float32_matrix_of_batch_by_features() -> None:
    """With half of the features dead; in bfloat16 not even the encoder's product is one."""
    b, d, n = 256, 16, 1024
    learner = Learner(BatchTopK(d, n, 4), Settings(1e-3, k_aux=32, dead_after=1))
    learner.sae.W_enc.data[:, : n // 2] *= 1e-3
    learner._low.copy_(learner.W_enc_T)
    z = torch.randn(b, d, generator=torch.Generator().manual_seed(0))
    learner.step(z)  # compiles; makes the workspace
    made: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            made.extend(x for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    tracemalloc.start()  # numpy's arrays
    with Watch():
        losses = learner.step(z)
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert losses.dead >= n // 2
    assert max(x.numel() for x in made if x.dtype == torch.bfloat16) >= b * n  # the product
    assert max(x.numel() for x in made if x.dtype.itemsize > 2) < b * n // 4
    assert numpy_peak < 4 * b * n // 2


@pytest.mark.parametrize(
    "kind", ["solo", "joint", "control", "jumprelu", "as-released", "ortsae", "matryoshka"]
)
def test_a_step_on_a_gpu_does_not_wait(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, where whatever needs one on the host raises."""
    joint = kind in ("joint", "control", "as-released")
    spec = ArmSpec(kind, 0, *((0.3, 1.0) if joint else ()))
    sizes = {"n_features": 96, "k": 4, "n_meta_features": 16, "meta_k": 2}
    settings = {"batch_tokens": 64, "n_primary_steps": 2, "n_meta_steps": 1, "k_aux": 8,
                "arms": ["solo"]}  # fmt: skip
    profile = Profile.load("tiny", {"dictionary": sizes, "training": settings})
    monkeypatch.setattr(Learner, "_room", lambda self: 70)
    monkeypatch.setattr(Learner, "_hear", lambda self, soon: None)
    trainer = Trainer(spec, profile, 24, torch.device("meta"))
    assert trainer.primary.kernels is kernels.plain
    for _ in range(HISTORY_EVERY - 1):
        losses = trainer.step(torch.empty(64, 24, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        losses.l2.item()


def test_the_list_of_dead_features_can_be_padded() -> None:
    """As on a GPU: the same step as with the list itself."""
    learners = []
    for _ in range(2):
        learner = Learner(BatchTopK(24, 96, 4), Settings(1e-2, dtype=torch.float32, k_aux=8))
        learner.kernels = kernels.plain
        learner.silent[:30] = 100
        learner.sae.W_enc.data[:, :30] *= 1e-3
        learners.append(learner)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        z = normalise(torch.randn(50, 24, generator=generator))[0]
        (plain, _), (padded, _) = (
            learner._step(z, None, room) for learner, room in zip(learners, (None, 64), strict=True)
        )
        assert plain.dead == padded.dead == 30
        assert plain.aux.item() == pytest.approx(padded.aux.item(), rel=1e-6)
    for one, other in zip(learners[0].state().values(), learners[1].state().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dead_after", [1, 2, 3, 6])
def test_there_is_room_for_all_dead_features(dead_after: int) -> None:
    """Although what is known of them is some steps old, as on a GPU."""
    n, rooms = 4096, set()
    learner = Learner(
        BatchTopK(24, n, 4), Settings(0.1, dtype=torch.float32, dead_after=dead_after)
    )
    learner.kernels = kernels.plain
    generator = torch.Generator().manual_seed(3)
    for size in (8, 8, 600, 8, 8, 8, 8, 300, 8, 8, 8, 8, 8):  # few fire, then many, then few
        rooms.add(room := learner._room())
        losses, soon = learner._step(torch.randn(size, 24, generator=generator), None, room)
        assert losses.dead <= room <= n
        learner._soon_dead.append((soon, SimpleNamespace(synchronize=lambda: None)))  # type: ignore[arg-type]
    assert len(rooms) > 1 or dead_after == 1


def test_nothing_is_used_that_a_recorded_graph_may_have_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: what one call gave is gone once another of the same workspace is made."""
    settings = {"batch_tokens": 64, "n_primary_steps": 2, "n_meta_steps": 2, "dtype": "float32"}
    profile = Profile.load("tiny", {"training": settings})
    given: list[Tensor] = []

    def call(_: Replay, key: object, function: Any, *inputs: Tensor) -> Any:
        places = [x.clone() for x in inputs]
        for tensor in given:
            tensor.fill_(-1)
        outputs = function(*places)
        flat = tree_leaves(outputs, is_leaf=lambda x: isinstance(x, Losses))
        losses = [x for one in flat if isinstance(one, Losses) for x in vars(one).values()]
        given[:] = [x for x in [*flat, *losses] if isinstance(x, Tensor)]
        return outputs

    histories, states = [], []
    for poisoned in (False, True):
        specs = ArmSpec("joint", 0, 0.3, 1.0), ArmSpec("solo", 0), ArmSpec("jumprelu", 0)
        trainers = [Trainer(spec, profile, 24, torch.device("cpu")) for spec in specs]
        generator = torch.Generator().manual_seed(0)
        with monkeypatch.context() as patch:
            if poisoned:
                patch.setattr(Replay, "__call__", call)
            for _ in range(HISTORY_EVERY):
                z = normalise(torch.randn(64, 24, generator=generator))[0]
                for trainer in trainers:
                    trainer.step(z)
        histories.append([t.history().drop(columns="seconds") for t in trainers])
        states.append([t.state() for t in trainers])
    assert given
    for expected, found in zip(*histories, strict=True):
        pd.testing.assert_frame_equal(found, expected)
    for before, after in zip(*states, strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before if "." in k)


def test_a_loss_that_was_not_finite_is_found_later() -> None:
    """As on a GPU, where nobody looks at every step."""
    trainer = Trainer(ArmSpec("solo", 0), Profile.load("tiny"), 24, torch.device("cpu"))
    trainer.step_count = 7
    trainer._unread = [torch.tensor(x) for x in (1.0, math.nan, math.nan)]
    with pytest.raises(TrainingError, match="step 6, batch 5: "):
        trainer.state()
