"""The benchmark's world is what its configuration says, and its scores are right by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from metasae_lib import Profile, Run
from metasae_lib.measure import synthsaebench
from metasae_lib.measure.fidelity import Active
from metasae_lib.show import (
    synthsaebench_pairs,
    synthsaebench_rows,
    synthsaebench_sentences,
)
from metasae_lib.study.errors import ProfileError, TrainingError
from metasae_lib.study.kept import KeptRun, keep
from metasae_lib.study.known import WORLDS
from metasae_lib.subject import Samples, World
from metasae_lib.subject.world import driven_apart, make_world
from metasae_lib.train import load_arms, train_arms, training

NAME = "synthsaebench-16k"
# Three trees of 1 + 2 + 4 atoms, 39 atoms beside them.
SMALL = replace(
    WORLDS[NAME], n_atoms=60, d=16, rates=(0.4, 0.03), roots=3, branching=2, depth=2, rank=3,
    correlation=0.35, steps=3,
)  # fmt: skip
FAST = {
    "dictionary": {"n_features": 32, "k": 3, "n_meta_features": 6, "meta_k": 2},
    "training": {"batch_tokens": 64, "train_tokens": 64 * 30, "k_aux": 8, "seeds": [0, 1],
                 "frontier": [2], "checkpoint_every": 7},
    "text.roles.scan": 500,
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL)


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The benchmark's profile on a small world."""
    monkeypatch.setitem(WORLDS, NAME, SMALL)
    return Run.open(Profile.load("synthsaebench", FAST), tmp_path / "runs")


def dense(samples: Samples, n_atoms: int) -> np.ndarray:
    strengths = np.zeros((len(samples.x), n_atoms))
    rows = np.repeat(np.arange(len(samples.x)), np.diff(samples.starts))
    assert (samples.strengths > 0).all() and len(set(zip(rows, samples.atoms, strict=True))) == len(
        rows
    )
    strengths[rows, samples.atoms] = samples.strengths
    return strengths


def plainly(world: World, b: int) -> np.ndarray:
    """Strengths (b, n) by the definition: a normal for each atom, then the trees, top down."""
    rng, n = np.random.default_rng(11), SMALL.n_atoms
    factors = world.factors.double().numpy()
    own = np.sqrt(1 - (factors**2).sum(1))
    g = rng.normal(size=(b, 3)) @ factors.T + own * rng.normal(size=(b, n))
    limits = norm.isf(world.probabilities.double().numpy())
    strengths = world.means.numpy() + world.spreads.numpy() * rng.normal(size=(b, n))
    strengths = np.maximum(strengths, 0) * (g > limits)
    for parent in range(9):  # 3 roots and their 6 children, which have children
        children = [3 + 2 * parent, 4 + 2 * parent]
        both = (strengths[:, children] > 0).all(1)
        loser = rng.integers(2, size=b)
        for place, child in enumerate(children):
            strengths[both & (loser == place), child] = 0
            strengths[:, child] *= strengths[:, parent] / world.means[parent].item()
    return strengths


def test_samples_have_the_statistics_of_the_plain_definition(world: World) -> None:
    b = 40_000
    ours, plain = dense(world.sample(b, [5]), SMALL.n_atoms), plainly(world, b)
    for power in (0, 1, 2):  # rates, mean strengths, mean squares; the pairs' likewise
        one, other = (np.where(s > 0, s**power, 0) for s in (ours, plain))
        z = (one.mean(0) - other.mean(0)) / np.sqrt((one.var(0) + other.var(0)) / b)
        assert 0.75 < np.sqrt((z**2).mean()) < 1.25 and np.abs(z).max() < 4.5
        pairs = np.triu_indices(SMALL.n_atoms, 1)
        p, q = ((side.T @ side / b)[pairs] for side in (one, other))
        seen = p + q > 0
        squares = (((side**2).T @ side**2 / b)[pairs] for side in (one, other))
        error = np.sqrt(sum(s - m**2 for s, m in zip(squares, (p, q), strict=True)) / b)
        z = (p - q)[seen] / error[seen]
        assert 0.85 < np.sqrt((z**2).mean()) < 1.15 and np.abs(z).max() < 5.5


def test_children_fire_with_their_parent_alone_and_at_about_their_rate(world: World) -> None:
    strengths = dense(world.sample(40_000, [6]), SMALL.n_atoms)
    fires = strengths > 0
    for child in range(3, 21):
        parent, sibling = (child - 3) // 2, child + 1 if child % 2 else child - 1
        assert not (fires[:, child] & ~fires[:, parent]).any()
        assert not (fires[:, child] & fires[:, sibling]).any()
    # Atoms without a parent fire at their rate, less the share of strengths below zero.
    top = np.r_[:3, 21:60]
    silent = norm.cdf(-(world.means / world.spreads).numpy())
    expected = (world.rates.numpy() * (1 - silent))[top]
    np.testing.assert_allclose(fires.mean(0)[top], expected, atol=4 * np.sqrt(0.25 / 40_000))


def test_probabilities_given_the_parent_by_hand(world: World) -> None:
    r = world.rates.tolist()
    assert r[0] == pytest.approx(0.4) and r[-1] == pytest.approx(0.03)
    power = [rank**-0.5 for rank in (1, 5, 60)]
    assert r[4] == pytest.approx(0.03 + 0.37 * (power[1] - power[2]) / (power[0] - power[2]))
    p = world.probabilities.tolist()
    assert p[2] == pytest.approx(r[2]) and p[40] == pytest.approx(r[40])
    assert p[5] == pytest.approx(min(1, r[5] / r[1] * (1 + r[6] / r[1])))  # of 1: 5 and 6
    assert p[20] == pytest.approx(min(1, r[20] / r[8] * (1 + r[19] / r[8])))


def test_a_sample_is_the_sum_of_its_atoms_and_a_function_of_its_key(world: World) -> None:
    samples = world.sample(300, [1, 2])
    x = dense(samples, SMALL.n_atoms) @ world.atoms.double().numpy() + world.bias.numpy()
    np.testing.assert_allclose(samples.x, x, atol=1e-4)
    assert torch.equal(samples.x, world.sample(300, [1, 2]).x)
    assert not torch.equal(samples.x, world.sample(300, [1, 3]).x)
    assert world.bias.norm().item() == pytest.approx(0.5)


def test_atoms_are_driven_apart_as_by_autograd() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    A = torch.nn.functional.normalize(rows, dim=1).requires_grad_()
    adam = torch.optim.Adam([A], lr=3e-3)
    for _ in range(20):
        adam.zero_grad()
        cosines = A @ A.T
        own = cosines.diagonal()
        loss = cosines.square().sum() - own.square().sum() + 50 * (own - 1).square().sum()
        loss.backward()
        adam.step()
    expected = torch.nn.functional.normalize(A.detach(), dim=1)
    torch.testing.assert_close(driven_apart(rows, 20, 3e-3), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, torch.nn.functional.normalize(rows, dim=1), atol=1e-2)


def test_scores_by_hand() -> None:
    atoms = torch.eye(4)[:3]
    rows = torch.tensor([[1.0, 0, 0, 0], [0.8, 0, 0, -0.6], [0, 0.6, 0.0, 0.8]])
    cosines = synthsaebench.abs_cosines(2 * rows, atoms)
    matches = cosines.argmax(1).numpy()
    assert matches.tolist() == [0, 0, 1]
    assert synthsaebench.uniqueness(matches) == pytest.approx(2 / 3)
    # One to one: 1 + 0.6 + 0 (the second row to the third atom).
    assert synthsaebench.mcc(cosines) == pytest.approx(1.6 / 3)
    # Atom 0 fires on samples 0, 1, 2; atom 1 on 3. Feature 0 on 0, 1; feature 1 on 2, 3; 2 never.
    given = Samples(torch.zeros(4, 4), np.arange(5), np.array([0, 0, 0, 1]), np.ones(4))
    found = Active(np.arange(5), np.array([0, 0, 1, 1]), np.ones(4, np.float32))
    detection = synthsaebench.Detection(matches, 3)
    detection.add(found, given)
    assert detection.fired.tolist() == [2, 2, 0] and detection.both.tolist() == [2, 1, 0]
    # F1 of feature 0: precision 1, recall 2/3; of feature 1: precision 1/2, recall 1/3.
    assert detection.f1() == pytest.approx((0.8 + 0.4 + 0) / 3)


def test_a_training_that_was_killed_goes_on_to_the_same_scores(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = synthsaebench.score_arms(small_run, train_arms(small_run))
    assert len(whole) == 10 and whole.held_out.eq(512).all() and whole.samples.eq(1920).all()
    assert whole.l0[whole.kind == "solo"].between(2.9, 3.0).all()
    again = Run.open(small_run.profile, tmp_path / "again")

    def killed(trainer: training.Trainer, z: torch.Tensor) -> object:
        if trainer.step_count == 20:
            raise KeyboardInterrupt
        return step(trainer, z)

    step = training.Trainer.step
    monkeypatch.setattr(training.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_arms(again)
    monkeypatch.setattr(training.Trainer, "step", step)
    with pytest.raises(TrainingError):
        load_arms(again)
    pd.testing.assert_frame_equal(synthsaebench.scores(again)[0], whole)


def test_training_on_the_world_finds_atoms(small_run: Run) -> None:
    profile = Profile.load("synthsaebench", FAST | {
        "training.learning_rate": 5e-3, "training.train_tokens": 64 * 800,
        "training.arms": ["solo"], "training.seeds": [0], "dictionary.n_features": 20,
    })  # fmt: skip
    run = Run.open(profile, small_run.runs_dir)
    arms = train_arms(run)
    (trained,) = synthsaebench.score_arms(run, arms).itertuples()
    start = type(arms["solo-seed0"].sae)(16, 20, 3, 0)
    atoms = make_world(SMALL).atoms
    assert trained.mcc > synthsaebench.mcc(synthsaebench.abs_cosines(start.W_dec, atoms)) + 0.1
    assert trained.variance_explained > 0.4 and trained.f1 > 0.3


def made_up() -> pd.DataFrame:
    """Scores of two seeds: solo at L2 0.4 and 0.6 (k smaller), joint at 0.5."""
    rows = []
    for seed in (0, 1):
        for kind, l2, f1 in (("solo", 0.4, 0.50), ("frontier", 0.6, 0.60), ("joint", 0.5, 0.57)):
            rows.append({
                "arm": f"{kind}-seed{seed}", "kind": kind, "seed": seed, "lambda2": np.nan,
                "samples": 1000, "l2": l2, "l0": 25.0, "dead": 0, "mcc": f1, "uniqueness": 1.0,
                "f1": f1 + seed * (0.012 if kind == "joint" else 0.01),
                "variance_explained": 1 - l2,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_differences_at_equal_l2_by_hand() -> None:
    found = synthsaebench.differences(made_up()).set_index(["setting", "against", "measure"])
    plain, equal = found.loc["joint", "solo", "f1"], found.loc["joint", "equal L2", "f1"]
    assert plain.difference == pytest.approx(0.071)
    assert equal.difference == pytest.approx(0.021) and equal.n_seeds == 2
    # Two differences 0.020 and 0.022: t(0.975, 1) = 12.706 times their standard error.
    assert equal.high - equal.difference == pytest.approx(12.706 * 0.001, rel=1e-3)
    assert ("frontier", "equal L2") not in found.index.droplevel(2)
    scores = made_up()
    scores.loc[scores.kind == "joint", "l2"] = 0.7
    beyond = synthsaebench.differences(scores).set_index(["setting", "against", "measure"])
    assert np.isnan(beyond.loc["joint", "equal L2", "f1"].difference)
    assert "nothing to compare" in synthsaebench_sentences(scores, beyond.reset_index())[1]


def test_what_a_reader_sees() -> None:
    scores = made_up()
    changes = synthsaebench.differences(scores)
    rows = synthsaebench_rows(scores)
    assert rows.arm[:3].tolist() == ["solo", "frontier", "joint"]
    assert rows.F1[0] == "0.5050 ± 0.0071" and rows.samples.iloc[-1] == 200_000_000
    assert rows.F1[rows.arm == "BatchTopK, published"].iloc[0] == "0.7316 ± 0.0010"
    solo, equal, levels = synthsaebench_sentences(scores, changes)
    assert "MCC by +0.0700" in solo and "further" not in equal and "nearer" in equal
    assert "200,000 times" in levels
    fewer = scores.assign(dead=np.where(scores.kind == "frontier", 40, 0))
    assert "(40 in frontier)" in synthsaebench_sentences(fewer, changes)[2]
    assert synthsaebench_pairs(changes).F1[2].startswith("+0.0210 (+0.0083 to +0.0337)")
    nothing = scores.iloc[:0]
    assert "No run of it is kept" in synthsaebench_sentences(
        nothing, synthsaebench.differences(nothing)
    )[0]  # fmt: skip
    assert len(synthsaebench_rows(nothing)) == 4


def test_a_kept_run_is_what_other_profiles_show(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    found, about = synthsaebench.scores(small_run)
    small_run.save_table("synthsaebench", found, about)
    target = keep(small_run.folder, tmp_path / "results")
    target.rename(target.with_name("synthsaebench"))
    monkeypatch.setattr(synthsaebench, "repository_folders", lambda name: [tmp_path / name])
    shown, about = synthsaebench.scores(run)
    pd.testing.assert_frame_equal(shown, found, check_dtype=False)
    assert "kept run of" in about and KeptRun(target.with_name("synthsaebench")).profile.synthetic
    monkeypatch.setattr(synthsaebench, "repository_folders", lambda name: [])
    assert synthsaebench.scores(run)[0].empty


def test_profiles_of_worlds() -> None:
    profile = Profile.load("synthsaebench")
    assert profile.synthetic and not Profile.load("tiny").synthetic
    assert profile.training.lambda2[0] * 768 / 25 == pytest.approx(0.3 * 1280 / 64, rel=0.01)
    assert len(profile.arms()) == 18 and profile.shape is not None and profile.shape.d_model == 768
    with pytest.raises(ProfileError, match="the worlds are synthsaebench-16k"):
        Profile.load("synthsaebench", {"model.source": "synthetic:other"})
    with pytest.raises(ProfileError, match="both synthetic, or neither"):
        Profile.load("tiny", {"text.source": "synthetic", "text.max_share": {}})
