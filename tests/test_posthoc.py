"""Meta SAEs on frozen decoders: rows with known structure, a hand-worked share, kept results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from metasae_lib import Profile, Run
from metasae_lib.study.arms import ArmSpec
from metasae_lib.train import posthoc
from metasae_lib.train.dictionary import BatchTopK
from metasae_lib.train.posthoc import meta_posthoc, settings, train_meta, variance_explained
from metasae_lib.train.training import Arm


def test_variance_explained_by_hand() -> None:
    """A meta dictionary that gives every normalised row back as zero explains by the mean alone."""
    W = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.0, 3.0, 1.0, 0.0]])
    meta = BatchTopK(4, 2, 1)
    meta.W_dec.data.zero_()
    # What is left is each row minus its own mean; the total is each row minus the mean row.
    missed = (W - W.mean(1, keepdim=True)).square().sum()
    total = (W - W.mean(0)).square().sum()
    assert variance_explained(W, meta) == pytest.approx(float(1 - missed / total))


def test_structure_is_found_and_noise_is_not() -> None:
    """Rows that are single meta atoms are explained; random rows of the same size are not."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(12, 32, generator=generator)
    chosen = torch.randint(0, 12, (400,), generator=generator)
    made = atoms[chosen] + 0.05 * torch.randn(400, 32, generator=generator)
    noise = torch.randn(400, 32, generator=generator)
    how = {"width": 24, "k": 1, "steps": 400, "batch": 400, "learning_rate": 3e-3}
    found = [
        variance_explained(W / W.norm(dim=1, keepdim=True),
                           train_meta(W / W.norm(dim=1, keepdim=True), how, torch.float32))
        for W in (made, noise)
    ]  # fmt: skip
    assert found[0] > 0.9 and found[1] < 0.5


def test_settings_follow_the_profile() -> None:
    profile = Profile.load("gpt2-large", {"training.meta_posthoc": ["bussmann", "saebench"]})
    both = settings(profile)
    assert (both["bussmann"]["width"], both["bussmann"]["k"]) == (1800, 8)
    assert both["bussmann"]["steps"] == profile.steps // 2
    assert (both["saebench"]["width"], both["saebench"]["steps"]) == (5120, 1500)
    assert settings(Profile.load("gpt2-large", {"training.meta_posthoc": []})) == {}


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(Profile.load("tiny", {"training.meta_posthoc": ["bussmann"]}), tmp_path)
    arm = Arm(ArmSpec("solo", 0), BatchTopK(48, 256, 8), None, pd.DataFrame(), tmp_path / "arm-1")
    first = meta_posthoc(run, {"solo-seed0": arm})
    assert first.setting.tolist() == ["bussmann"]
    monkeypatch.setattr(posthoc, "train_meta", None)
    pd.testing.assert_frame_equal(meta_posthoc(run, {"solo-seed0": arm}), first)
