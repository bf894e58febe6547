"""The synthetic world is what it says, and the scores are right where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metasae_lib import Profile
from metasae_lib.measure.synthetic import (
    KINDS,
    World,
    blending,
    make_world,
    mean_abs_phi,
    recovery,
    score,
    train,
)
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(d=48, pairs=dict.fromkeys(KINDS, 4), rate=0.05, correlation=0.6)


def test_atoms_are_unit_centred_and_shared_only_between_senses(world: World) -> None:
    torch.testing.assert_close(world.atoms.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(world.atoms.mean(1), torch.zeros(32), atol=1e-6, rtol=0)
    cosine = (world.atoms[::2] * world.atoms[1::2]).sum(1)
    senses = [kind == "senses" for kind in world.kinds]
    torch.testing.assert_close(cosine[senses], torch.full((4,), 0.5))
    assert cosine[[not s for s in senses]].abs().max() < 0.5


def test_pairs_fire_as_their_kind_says(world: World) -> None:
    _, strength = world.sample(100_000, seed=3)
    fires = (strength > 0).numpy()
    assert strength[strength > 0].min() >= 0.5 and strength.max() <= 1.5
    first, second, both = world.probabilities.T
    rates = torch.stack([first + both, second + both], dim=1).flatten()
    np.testing.assert_allclose(fires.mean(0), rates, atol=0.004)
    correlation = np.corrcoef(fires.T)
    by_kind = {kind: [] for kind in KINDS}
    for pair, kind in enumerate(world.kinds):
        by_kind[kind].append(correlation[2 * pair, 2 * pair + 1])
        a, b = fires[:, 2 * pair], fires[:, 2 * pair + 1]
        if kind == "hierarchical":
            assert not (b & ~a).any()
        if kind == "senses":
            assert not (a & b).any()
    np.testing.assert_allclose(by_kind["independent"], 0, atol=0.015)
    np.testing.assert_allclose(by_kind["correlated"], 0.6, atol=0.03)
    np.testing.assert_allclose(by_kind["hierarchical"], np.sqrt(0.5 * 0.95 / 0.975), atol=0.03)
    across = correlation[np.ix_(range(0, 32, 2), range(0, 32, 2))] - np.eye(16)
    assert np.abs(across).max() < 0.02


def test_tokens_are_the_sum_of_their_atoms(world: World) -> None:
    tokens, strength = world.sample(500, seed=5)
    rest = tokens - strength @ world.atoms - world.offset
    assert rest.std().item() == pytest.approx(world.noise, rel=0.05)
    again, _ = world.sample(500, seed=5)
    assert torch.equal(tokens, again)


def test_blending_by_hand() -> None:
    a, b = torch.eye(4)[:1], torch.eye(4)[1:2]
    rows = torch.stack([a, a + b, 3 * a + b, a - b, b, a + torch.eye(4)[2:3]])[:, 0]
    found = blending(rows, a.expand(6, 4), b.expand(6, 4))
    torch.testing.assert_close(found, torch.tensor([0, 0.5, 0.25, 0.5, 1, 0]))
    shared = (a + 3**0.5 * b) / 2  # two senses with cosine 0.5: each alone is no blend
    assert blending(a, a, shared).item() == pytest.approx(0, abs=1e-6)
    assert blending(a + shared, a, shared).item() == pytest.approx(0.5)


def test_true_atoms_are_recovered_and_a_blend_is_not(world: World) -> None:
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    found = recovery(world.atoms[mixed], world)
    assert found.recovered.all() and found.blending.max() < 1e-3
    blends = world.atoms.clone()
    blends[0] = blends[1] = (blends[0] + blends[1]) / (blends[0] + blends[1]).norm()
    found = recovery(blends, world)
    assert not found.recovered[:2].any() and found.recovered[2:].all()
    np.testing.assert_allclose(found.blending[:2], 0.5, atol=0.01)
    few = recovery(world.atoms[:10], world)
    assert few.recovered.sum() == 10 and few.blending.isna().sum() == 22


def test_mean_abs_phi_against_numpy(world: World) -> None:
    fires = world.sample(4000, seed=1)[1] > 0
    correlation = np.corrcoef(fires.T.numpy())
    expected = np.abs(correlation[np.triu_indices(32, 1)]).mean()
    assert mean_abs_phi(fires) == pytest.approx(expected)


def test_a_short_training_finds_independent_atoms_and_the_control_is_solo() -> None:
    world = make_world(d=32, pairs={"independent": 10}, rate=0.08)
    sizes = {"n_features": 20, "k": 2, "n_meta_features": 4, "meta_k": 2}
    training = {"train_tokens": 256 * 500, "batch_tokens": 256, "dtype": "float32", "k_aux": 8}
    profile = Profile.load(
        "tiny",
        {"dictionary": sizes, "training": training | {"learning_rate": 5e-3, "arms": ["solo"]}},
    )
    specs = [ArmSpec("solo", 0), ArmSpec("control", 0, 0.0, 1.0)]
    saes = train(world, specs, profile)
    solo, control = saes.values()
    assert torch.equal(solo.W_dec, control.W_dec)
    found = score(solo, world)
    untrained = score(BatchTopK(32, 20, 2, seed=0), world)
    assert found["recovered independent"] >= 0.7 > untrained["recovered independent"]
    assert found["l2"] < 0.3 * untrained["l2"]
    assert found["blending independent"] < 0.1


def test_worlds_that_cannot_be_are_refused() -> None:
    with pytest.raises(MeasureError, match="no kind of pair 'twins'"):
        make_world(pairs={"twins": 1})
    with pytest.raises(MeasureError, match="rate within 0"):
        make_world(rate=0.7)
