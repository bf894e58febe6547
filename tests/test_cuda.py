"""What runs on a GPU gives what the CPU gives. Without one these are skipped, and -rs says so."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.fidelity import reconstruct
from metasae_lib.measure.thresholds import RULES, Calibrator
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.profile import Profile
from metasae_lib.train.dictionary import BatchTopK, normalise
from metasae_lib.train.replay import Replay, Workspace
from metasae_lib.train.trainer import Trainer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the CUDA path was NOT tested"
)


def test_counts_are_the_same_integers() -> None:
    generator = np.random.default_rng(0)
    a = generator.random((5000, 300)) < generator.uniform(0, 0.3, 300)
    b = generator.random((5000, 170)) < 0.1
    a[:, 0], a[:, 1] = True, False
    for given_b, n_b in ((None, None), (torch.from_numpy(b), 170)):
        found = []
        for device in ("cpu", "cuda"):
            counter = CooccurrenceCounter(300, n_b, device)
            for part in np.array_split(np.arange(5000), 3):
                second = None if given_b is None else given_b[part]
                counter.update(torch.from_numpy(a)[part].to(device), second)
            found.append(counter)
        assert torch.equal(found[0].n11, found[1].n11.cpu())
        assert torch.equal(found[0].n1_a, found[1].n1_a)


def test_thresholds_and_reconstructions_are_the_same() -> None:
    sae, z = (
        BatchTopK(64, 256, 8),
        torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)),
    )
    pre = sae.pre_activations(z)
    results = []
    for device in ("cpu", "cuda"):
        calibrator = Calibrator(256, 8, window=(1e-6, 1e6))
        calibrator.update(pre.to(device))
        results.append(calibrator.result())
    for rule in RULES:
        assert torch.equal(results[0].threshold(rule), results[1].threshold(rule))
    sae.threshold = results[0].threshold("rate")
    on_cpu = reconstruct(sae, z, "threshold")[0]
    on_gpu = reconstruct(sae.to("cuda"), z.to("cuda"), "threshold")[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["solo", "joint", "jumprelu", "matryoshka"])
def test_training_steps_are_the_same(kind: str) -> None:
    """Dead features included: a GPU counts them some steps late, and pads their list."""
    sizes = {"n_features": 512, "k": 8, "n_meta_features": 46, "meta_k": 4}
    settings = {"batch_tokens": 256, "n_primary_steps": 4, "n_meta_steps": 2, "dtype": "float32"}
    profile = Profile.load("tiny", {"dictionary": sizes, "training": settings})
    spec = ArmSpec(kind, 0, *((0.3, 1.0) if kind == "joint" else ()))
    trainers = [Trainer(spec, profile, 64, torch.device(device)) for device in ("cpu", "cuda")]
    generator = torch.Generator().manual_seed(0)
    for trainer in trainers:
        trainer.primary.silent[:100] = 1000
        trainer.primary.W_enc_T[:100] *= 1e-3
        trainer.primary._low.copy_(trainer.primary.W_enc_T)
    for _ in range(24):  # from the second time on what has been recorded
        z = normalise(torch.randn(256, 64, generator=generator))[0]
        losses = [trainer.step(z.to(trainer.primary.b_dec.device)) for trainer in trainers]
        assert int(losses[0].dead) == int(losses[1].dead) >= 90
        assert losses[1].l2.item() == pytest.approx(losses[0].l2.item(), rel=1e-4)
        assert losses[1].aux.item() == pytest.approx(losses[0].aux.item(), rel=1e-3)


def test_what_was_recorded_goes_on_as_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms side by side, which share memory; their histories; and what follows a checkpoint."""
    training = {"batch_tokens": 256, "n_primary_steps": 4, "n_meta_steps": 2}
    profile = Profile.load("tiny", {"training": training})
    specs = [ArmSpec("joint", 0, 0.3, 1.0), ArmSpec("solo", 1), ArmSpec("jumprelu", 0)]
    batches = torch.randn(40, 256, 64, generator=torch.Generator().manual_seed(0))
    device, shared = torch.device("cuda"), Workspace()
    plain, recorded, resumed = (
        [Trainer(spec, profile, 64, device, shared) for spec in specs] for _ in range(3)
    )
    for step, z in enumerate(normalise(batches.to(device))[0]):
        if step == 20:
            for before, after in zip(recorded, resumed, strict=True):
                for other in batches[:7].to(device):  # other graphs, and other features dead
                    after.step(other)
                after.restore({name: tensor.cpu() for name, tensor in before.state().items()})
        with monkeypatch.context() as patch:
            patch.setattr(Replay, "__call__", lambda _, key, function, *inputs: function(*inputs))
            for trainer in plain:
                trainer.step(z)
        for trainer in [*recorded, *(resumed if step >= 20 else [])]:
            trainer.step(z)
    for expected, *others in zip(plain, recorded, resumed, strict=True):
        history = expected.history().drop(columns="seconds")
        for trainer in others:
            assert any(trainer.primary._replay._graphs.values())
            pd.testing.assert_frame_equal(
                trainer.history().drop(columns="seconds"), history, rtol=1e-3, atol=1e-4
            )
            for name, tensor in trainer.state().items():
                if name not in ("history", "progress"):
                    torch.testing.assert_close(
                        tensor, expected.state()[name], atol=1e-4, rtol=1e-3, msg=name
                    )
