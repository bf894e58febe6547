from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metasae_lib import Run
from metasae_lib.measure import fidelity, passes, scan, thresholds
from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.phi import summarise
from metasae_lib.study.arms import ArmSpec
from metasae_lib.train.dictionary import BatchTopK, normalise

# The room's face gives the function of this name, not its module.
sensitivity = import_module("metasae_lib.measure.sensitivity")

ROWS, LENGTH, D = 40, 10, 16


class FakeSubject:
    """A residual that depends on the token and on all before it, as causal attention gives."""

    embedding = torch.randn(50, D, generator=torch.Generator().manual_seed(0))

    def residuals(self, ids: Any) -> torch.Tensor:
        x = self.embedding[torch.as_tensor(np.asarray(ids)).long()]
        return x + 0.3 * x.cumsum(1).roll(1, 1).index_fill(1, torch.tensor([0]), 0.0)


@pytest.fixture
def arms(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, 50, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0] = 0

    class FakeResiduals:
        device = torch.device("cpu")
        n_chunks, n_tokens = 1, ROWS * (LENGTH - 1)

        def __init__(self, run: Run, role: str, subject: object = None) -> None:
            self.inputs = {"role": role}

        def chunk(self, index: int) -> torch.Tensor:
            return FakeSubject().residuals(ids)[:, 1:].flatten(0, 1)

    tokens = SimpleNamespace(rows=lambda role: ids)
    for module in (scan, thresholds, sensitivity):
        monkeypatch.setattr(module, "Residuals", FakeResiduals)
    for module in (fidelity, sensitivity):
        monkeypatch.setattr(module, "load_tokens", lambda run: tokens)
    found = {}
    for spec in (ArmSpec("solo", 0), ArmSpec("joint", 0, 0.3, 1.0)):
        sae = BatchTopK(D, 40, 4, seed=int(spec.kind == "joint"))
        found[spec.name] = SimpleNamespace(spec=spec, sae=sae, folder=run.folder / spec.name)
    return found


def mean_abs(arm: Any, x: torch.Tensor) -> float:
    pre = passes.pre_activations(arm.sae, normalise(x)[0], torch.bfloat16)
    counter = CooccurrenceCounter(40)
    counter.update(pre > arm.sae.threshold)
    return summarise(counter.counts()).mean_abs


def test_every_choice_equals_counting_again(run: Run, arms: dict[str, Any]) -> None:
    subject = FakeSubject()
    frame = sensitivity.sensitivity(run, arms, subject, bos_rows=8)  # type: ignore[arg-type]
    ids = sensitivity.load_tokens(run).rows("scan")
    for name, arm in arms.items():
        mine = frame[frame.arm == name].set_index(["group", "variant"])
        everything = subject.residuals(ids).flatten(0, 1)
        with_first = mine.loc[("position 0", "with position 0")]
        assert with_first.mean_abs == pytest.approx(mean_abs(arm, everything), rel=1e-9)
        kept = subject.residuals(ids)[:, 1:].flatten(0, 1)
        for group in ("position 0", "pairs", "thresholds"):  # 40 features: all are in the subset
            base = mine.loc[(group, "base")]
            assert base.mean_abs == pytest.approx(mean_abs(arm, kept), rel=1e-9)
            assert base.change_pct == 0
        without = subject.residuals(ids[:8, 1:])[:, 1:].flatten(0, 1)
        assert mine.loc[("BOS", "without BOS")].mean_abs == pytest.approx(mean_abs(arm, without))
        same = subject.residuals(ids[:8])[:, 2:].flatten(0, 1)
        assert mine.loc[("BOS", "base")].mean_abs == pytest.approx(mean_abs(arm, same))
        scales = mine.loc["thresholds"].dropna(subset="scale").sort_values("scale")
        assert scales.scale.tolist() == [0.9, 0.95, 1.0, 1.05, 1.1]
        assert scales.l0.is_monotonic_decreasing
    assert frame.kind.tolist() == [arms[name].spec.kind for name in frame.arm]
    kept_table = sensitivity.sensitivity(run, arms, None, bos_rows=8)  # read, no model needed
    assert kept_table.equals(frame)


def test_headline_compares_two_arms_under_each_choice(run: Run, arms: dict[str, Any]) -> None:
    frame = sensitivity.sensitivity(run, arms, FakeSubject(), bos_rows=8)  # type: ignore[arg-type]
    solo, joint = arms
    table = sensitivity.headline_by_choice(frame, solo, joint)
    assert len(table) == len(frame) / 2
    row = table[(table.group == "thresholds") & (table.variant == "scale-1.1")].iloc[0]
    of = frame[(frame.group == "thresholds") & (frame.variant == "scale-1.1")].set_index("arm")
    change = 100 * (of.mean_abs[joint] / of.mean_abs[solo] - 1)
    assert row.change_pct == pytest.approx(change)
