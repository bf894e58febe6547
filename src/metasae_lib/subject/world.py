"""A world of known atoms at a size that compares: SynthSAEBench (arXiv 2602.14687), version 2.

A sample is x = b + Σ_i s_i A_i over the atoms that fire. Atom i would fire where

    F_i·ε + √(1 - |F_i|²) η_i > t_i,   ε ~ N(0, I_r) shared by all atoms, η_i ~ N(0, 1) its own,

so with probability p_i = Φ(-t_i), correlated with the others through its factors F_i. The first
atoms form trees: a child fires only with its parent, of children that would fire one is drawn, and
its strength is multiplied by the parent's over the parent's mean. p_i is raised so that each still
fires at about its own rate. Strengths are normal, and an atom of negative strength is silent.

The construction follows the printed configuration and SAELens' order of random draws, so that
SAELens makes the same world from it on a CPU. Sampling is our own: given ε, atoms fire
independently, so only those that do are drawn (`_fire`), instead of a normal for each atom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from numba import njit
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lib.study import Artefact, Run, atomic_write, progress
from metasae_lib.study.known import WORLDS, WorldSpec
from metasae_lib.study.sections import ROLES, Role

Array = np.ndarray
_VERSION = 1  # of the atoms and of the samples
# Bounds of -log Φ(s) on a grid of s: between two points it is at most its value at the lower one.
_LOW, _HIGH, _PER_UNIT = -8, 8, 64
_BOUNDS = -scipy.special.log_ndtr(np.linspace(_LOW, _HIGH, (_HIGH - _LOW) * _PER_UNIT + 1))
_PART = 128  # samples at a time: their limits stay in the cache
_BOUNDS[0] = np.inf  # it stands for everything below as well


@dataclass(frozen=True)
class Samples:
    """x: (b, d) float32. Atom `atoms[j]` fires with `strengths[j]` > 0 on the sample i whose range
    starts[i] to starts[i + 1] holds j; starts (b + 1,), atoms and strengths of all samples."""

    x: Tensor
    starts: Array
    atoms: Array
    strengths: Array


class _Sampler(NamedTuple):
    """A world as `_fire` wants it. top: (m,) atoms without a parent. exceed: (1 + r, m), so that
    (1, ε) times it is what η of each must exceed. factors (n, r) and limits (n,): over each atom's
    own deviation. bounds: see `_BOUNDS`."""

    top: Array
    exceed: Array
    factors: Array
    limits: Array
    means: Array
    spreads: Array
    roots: int
    branching: int
    depth: int
    n_parents: int
    bounds: Array


@dataclass(frozen=True)
class World:
    """atoms: (n, d) unit rows. bias: (d,), in every sample. rates: (n,) at which atoms are meant to
    fire. probabilities: (n,) of firing, given the parent. factors: (n, r). means, spreads: (n,) of
    strengths. All float32.
    """

    spec: WorldSpec
    atoms: Tensor
    bias: Tensor
    rates: Tensor
    probabilities: Tensor
    factors: Tensor
    means: Tensor
    spreads: Tensor

    def sample(self, b: int, key: Sequence[int]) -> Samples:
        """b samples, a function of `key` alone."""
        rng, found = np.random.default_rng(key), []
        for n in (min(_PART, b - start) for start in range(0, b, _PART)):
            shared = rng.standard_normal((n, self.spec.rank), dtype=np.float32)
            above = np.hstack([np.ones((n, 1), np.float32), shared]) @ self._sampler.exceed
            found.append(_fire(rng, above, shared, self._sampler))
        counts, atoms, strengths = map(np.concatenate, zip(*found, strict=True))
        starts = np.concatenate([[0], np.cumsum(counts)])
        x = F.embedding_bag(
            torch.from_numpy(atoms), self.atoms, torch.from_numpy(starts[:-1]), mode="sum",
            per_sample_weights=torch.from_numpy(strengths),
        )  # fmt: skip
        return Samples(x.add_(self.bias), starts, atoms, strengths)

    @cached_property
    def _sampler(self) -> _Sampler:
        spec = self.spec
        own = (1 - self.factors.double().square().sum(1, keepdim=True)).sqrt()
        factors = (self.factors / own).float().numpy()
        limits = -scipy.special.ndtri(self.probabilities.double().numpy()) / own[:, 0].numpy()
        limits = limits.astype(np.float32)
        top = np.r_[: spec.roots, spec.n_tree : spec.n_atoms]
        return _Sampler(
            top, np.vstack([limits[top], -factors[top].T]), factors, limits, self.means.numpy(),
            self.spreads.numpy(), spec.roots, spec.branching, spec.depth, spec.n_parents, _BOUNDS,
        )  # fmt: skip


class SampleStream:
    """Training samples of a run's world, for ever; for training, in the place of `BatchStream` and
    of its residuals."""

    def __init__(self, run: Run) -> None:
        self._run, self._batch = run, run.profile.training.batch_tokens
        spec = _spec(run)
        self.d = spec.d
        self.inputs = {
            "world": asdict(spec), "version": _VERSION, "seed": run.profile.text.seed
        }  # fmt: skip
        self.residuals = self

    def batch(self, step: int, order: int = 0) -> Tensor:
        """Samples (b, d) of training step `step`, from 0. order: seed of another stream."""
        return samples(self._run, "train", step, self._batch, order).x

    def fill(self) -> None:
        """Make the world, if it is not made."""
        world_of(self._run)

    def chunk(self, index: int) -> Tensor:
        """The samples that a `training.start` is made from."""
        return self.batch(index)


def samples(run: Run, role: Role, index: int, b: int, order: int = 0) -> Samples:
    """Batch `index` of b samples for a role; roles share none."""
    key = run.profile.text.seed, ROLES.index(role), order, index
    return world_of(run).sample(b, key)


def world_of(run: Run) -> World:
    """The world of a run, made once and kept."""
    if "world" not in run.held:
        spec = _spec(run)

        def make(missing: dict[str, Artefact]) -> None:
            artefact = missing["world"]
            with atomic_write(artefact.folder / "atoms.safetensors") as path:
                save_file({"atoms": make_world(spec).atoms}, path)
            artefact.finish()

        made = run.made("world", {"world": asdict(spec)}, _VERSION, make)
        atoms = load_file(made["world"].folder / "atoms.safetensors")["atoms"]
        run.held["world"] = make_world(spec, atoms)
    world: World = run.held["world"]
    return world


def _spec(run: Run) -> WorldSpec:
    return WORLDS[run.profile.model.source.partition(":")[2]]


def make_world(spec: WorldSpec, atoms: Tensor | None = None) -> World:
    """The world of a configuration. atoms: (n, d), those of an earlier call, to save their making.

    Every part has a generator of its own, seeded as SAELens seeds it.
    """

    def normals(offset: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(spec.seed + offset)
        return torch.randn(*shape, generator=generator)

    n = spec.n_atoms
    # The bias is drawn from the generator of the atoms, behind them.
    generator = torch.Generator().manual_seed(spec.seed)
    drawn = F.normalize(torch.randn(n, spec.d, generator=generator), dim=1, eps=1e-8)
    bias = spec.bias * F.normalize(torch.randn(spec.d, generator=generator), dim=0, eps=1e-8)
    factors = spec.correlation * normals(4, n, spec.rank)
    length = factors.norm(dim=1, keepdim=True)
    factors *= torch.where(length**2 > 0.99, math.sqrt(0.99) / length, 1.0)
    mean, deviation = spec.spread
    power = torch.arange(1, n + 1, dtype=torch.float32) ** -spec.exponent
    first, last = spec.rates
    rates = last + (first - last) * (power - power[-1]) / (power[0] - power[-1])
    return World(
        spec=spec,
        atoms=driven_apart(drawn, spec.steps, spec.learning_rate) if atoms is None else atoms,
        bias=bias,
        rates=rates,
        probabilities=_given_parent(spec, rates),
        factors=factors,
        means=torch.linspace(spec.strengths[0], spec.strengths[1], n),
        spreads=(mean + deviation * normals(1, n)).abs(),
    )


def _given_parent(spec: WorldSpec, rates: Tensor) -> Tensor:
    """Probability of each atom given that its parent fires, so that its rate is about as meant.

    For a child of rate r under a parent of rate P: r / P, times 1 + Σ r' / P over its siblings,
    the expected number of rivals.
    """
    children = torch.arange(spec.roots, spec.n_tree)
    parents = (children - spec.roots) // spec.branching
    share = rates[children] / rates[parents]
    rivals = share.view(-1, spec.branching).sum(1).repeat_interleave(spec.branching) - share
    probabilities = rates.clone()
    probabilities[children] = (share * (1 + rivals)).clamp(max=1)
    return probabilities


def driven_apart(rows: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Rows (n, d) after Adam on Σ_{i≠j} (A_i·A_j)² + n Σ_i (|A_i|² - 1)², made unit.

    The gradient is 4 A (AᵀA) + 4 (n (|A_i|² - 1) - |A_i|²) A_i: products of d × d in the place of
    the n × n cosines, which SAELens forms in chunks.
    """
    A, n = F.normalize(rows, dim=1, eps=1e-8), len(rows)
    adam = torch.optim.Adam([A], lr=learning_rate)
    with progress(steps, "driving atoms apart") as bar:
        for _ in range(steps):
            square = A.square().sum(1, keepdim=True)
            A.grad = 4 * (A @ (A.T @ A) + (n * (square - 1) - square) * A)
            adam.step()
            bar.update()
    return F.normalize(A, dim=1, eps=1e-8)


@njit(nogil=True)
def _fire(
    rng: np.random.Generator, above: Array, shared: Array, world: _Sampler
) -> tuple[Array, Array, Array]:
    """Draw the atoms that fire: how many of each sample (b,), which, and how strongly.

    above: (b, m) what η of each atom without a parent must exceed. Those are passed over by an
    exponential clock: with h at least its hazard -log(1 - p), an atom is proposed with probability
    1 - exp(-h) and accepted with p over that. Exact, at an addition an atom. shared: (b, r) ε.
    """
    b, m = above.shape
    n_most = b * (m + world.roots * world.depth)  # pages that nothing is written to cost no memory
    counts = np.zeros(b, np.int64)
    atoms, strengths = np.empty(n_most, np.int64), np.empty(n_most, np.float32)
    filled = 0
    for i in range(b):
        before, clock = filled, rng.standard_exponential()
        for j in range(m):
            s = above[i, j]
            bound = world.bounds[int((min(max(s, _LOW), _HIGH) - _LOW) * _PER_UNIT)]
            if clock > bound:
                clock -= bound
                continue
            clock = rng.standard_exponential()
            if rng.random() * -math.expm1(-bound) >= 0.5 * math.erfc(s / math.sqrt(2.0)):
                continue
            atom = world.top[j]
            strength = world.means[atom] + world.spreads[atom] * rng.standard_normal()
            while strength > 0:  # down the tree, as far as a child fires
                atoms[filled], strengths[filled] = atom, strength
                filled += 1
                if atom >= world.n_parents:
                    break
                first = world.roots + world.branching * atom
                scale, strength, rivals = strength / world.means[atom], 0.0, 0
                for child in range(first, first + world.branching):
                    s = world.limits[child]
                    for factor in range(shared.shape[1]):
                        s -= shared[i, factor] * world.factors[child, factor]
                    if rng.random() < 0.5 * math.erfc(s / math.sqrt(2.0)):
                        own = world.means[child] + world.spreads[child] * rng.standard_normal()
                        if own > 0:
                            rivals += 1
                            if rng.random() * rivals < 1:  # each of them is as likely to stay
                                atom, strength = child, scale * own
        counts[i] = filled - before
    return counts, atoms[:filled].copy(), strengths[:filled].copy()
