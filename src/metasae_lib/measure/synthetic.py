"""A world with known atoms: which dictionary recovers them, and which blends them.

Tokens are sums of a few unit directions, the *atoms*, plus a constant offset and noise. Atoms come
in pairs whose members fire independently, together, one only within the other, or never together
but with a shared component, as two senses of a word do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.matching import hungarian
from metasae_lib.measure.phi import phi
from metasae_lib.study import ArmSpec, MeasureError, Profile
from metasae_lib.train import Dictionary, normalise
from metasae_lib.train.trainer import Trainer

KINDS = ("independent", "correlated", "hierarchical", "senses")
RECOVERED = 0.9  # cosine from which an atom counts as recovered
_OFFSET, _SCORED = 3.0, 8192


@dataclass(frozen=True)
class World:
    """Atoms (2p, d), unit rows of mean zero; atoms 2i and 2i+1 are pair i.

    kinds (p,): one of `KINDS` a pair. probabilities (p, 3): that only the first of a pair fires on
    a token, only the second, both. offset (d,): in every token. noise: its standard deviation in
    every direction.
    """

    atoms: Tensor
    kinds: tuple[str, ...]
    probabilities: Tensor
    offset: Tensor
    noise: float

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """n tokens (n, d) and the strength of every atom on each (n, 2p), 0 where it is silent."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(n, len(self.kinds), 1, generator=generator)
        outcome = (draw >= self.probabilities.cumsum(1)).sum(2)  # 0, 1, 2, and 3 for neither
        fires = torch.stack([outcome % 2 == 0, (outcome == 1) | (outcome == 2)], dim=2)
        strength = 0.5 + torch.rand(n, len(self.atoms), generator=generator)
        strength *= fires.flatten(1)
        noise = self.noise * torch.randn(n, self.atoms.shape[1], generator=generator)
        return strength @ self.atoms + self.offset + noise, strength


def make_world(
    d: int = 64,
    pairs: Mapping[str, int] | None = None,
    rate: float = 0.03,
    correlation: float = 0.6,
    shared: float = 0.5,
    noise: float = 0.02,
    seed: int = 0,
) -> World:
    """Draw a world. pairs: how many of each kind (16 by default); rate: of an atom, per token.

    Members of a pair fire: `independent` by chance; `correlated` with this φ; `hierarchical` the
    second only with the first, half of the time; `senses` never together, with cosine `shared`
    between their directions. All other directions are random.
    """
    pairs = dict.fromkeys(KINDS, 16) if pairs is None else dict(pairs)
    if unknown := set(pairs) - set(KINDS):
        raise MeasureError(f"there is no kind of pair '{unknown.pop()}': choose of {KINDS}")
    if not (0 < rate < 0.5 and 0 <= correlation <= 1 and 0 <= shared < 1 and d > 2):
        raise MeasureError(
            "give a rate within 0 and 0.5, a correlation and a shared cosine of 0 to 1, and d > 2"
        )
    together = rate**2 + correlation * rate * (1 - rate)
    table = {
        "independent": (rate - rate**2, rate - rate**2, rate**2),
        "correlated": (rate - together, rate - together, together),
        "hierarchical": (rate / 2, 0.0, rate / 2),
        "senses": (rate, rate, 0.0),
    }
    kinds = tuple(kind for kind in KINDS for _ in range(pairs.get(kind, 0)))
    generator = torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        drawn = torch.randn(len(kinds), d, generator=generator, dtype=torch.float64)
        drawn -= drawn.mean(1, keepdim=True)
        return drawn / drawn.norm(dim=1, keepdim=True)

    first, second = directions(), directions()
    across = second - (second * first).sum(1, keepdim=True) * first
    across /= across.norm(dim=1, keepdim=True)
    alike = torch.tensor([kind == "senses" for kind in kinds])[:, None]
    second = torch.where(alike, shared * first + (1 - shared**2) ** 0.5 * across, second)
    offset = torch.randn(d, generator=generator)
    return World(
        atoms=torch.stack([first, second], dim=1).flatten(0, 1).float(),
        kinds=kinds,
        probabilities=torch.tensor([table[kind] for kind in kinds]),
        offset=_OFFSET * offset / offset.norm(),
        noise=noise,
    )


def train(world: World, specs: Sequence[ArmSpec], profile: Profile) -> dict[str, Dictionary]:
    """Train arms on the world with the library's own step, all on the same tokens, by arm name.

    `profile` gives sizes and settings. Matrices are small: with one thread this is faster.
    """
    width = world.atoms.shape[1]
    trainers = [Trainer(spec, profile, width, torch.device("cpu")) for spec in specs]
    for step in range(profile.steps):
        z = normalise(world.sample(profile.training.batch_tokens, step)[0])[0]
        for trainer in trainers:
            trainer.step(z)
    return {trainer.spec.name: trainer.primary.sae for trainer in trainers}


def blending(rows: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """How much of each row is another atom's: |c_p| / (|c_o| + |c_p|), row ≈ c_o own + c_p partner.

    All (m, d). Returns (m,): 0 for a pure row, 0.5 for an equal blend, towards 1 for a row that is
    the partner's. The fit is by least squares, so a shared component of two senses is no blend.
    """
    basis = torch.stack([own, partner], dim=2)
    size = torch.linalg.lstsq(basis, rows[:, :, None]).solution[:, :, 0].abs()
    return size[:, 1] / size.sum(1).clamp_min(1e-12)


def recovery(W_dec: Tensor, world: World) -> pd.DataFrame:
    """How well decoder rows (n, d) match the atoms one to one (Hungarian, by cosine).

    One row an atom: atom, kind, cosine (with its row; 0 if it got none), recovered (cosine of
    `RECOVERED` at least), blending (of its row with the pair's other atom; nan if it got none).
    """
    rows, atoms, cosines = hungarian(W_dec, world.atoms)
    n = len(world.atoms)
    cosine, blend = np.zeros(n), np.full(n, np.nan)
    cosine[atoms] = cosines
    blend[atoms] = blending(W_dec[rows], world.atoms[atoms], world.atoms[atoms ^ 1])
    return pd.DataFrame(
        {
            "atom": np.arange(n),
            "kind": np.repeat(world.kinds, 2),
            "cosine": cosine,
            "recovered": cosine >= RECOVERED,
            "blending": blend,
        }
    )


def mean_abs_phi(fires: Tensor) -> float:
    """mean |φ| over the pairs of columns (n, f) that fire at all and not always."""
    counter = CooccurrenceCounter(fires.shape[1])
    counter.update(fires)
    values = phi(counter.n11.numpy(), counter.n1_a, counter.n1_b, counter.n_tokens)
    return float(np.nanmean(np.abs(values[np.triu_indices(len(values), 1)])))


def score(sae: Dictionary, world: World, seed: int = 2**31) -> dict[str, float]:
    """What one dictionary makes of the world, on tokens that no arm was trained on.

    Keys: l2; mean_abs_phi of its features and atoms_mean_abs_phi of the atoms themselves; and by
    kind of pair `recovered <kind>` (share of atoms) and `blending <kind>` (mean).
    """
    tokens, strength = world.sample(_SCORED, seed)
    z = normalise(tokens)[0]
    acts = sae.encode(z)
    found = recovery(sae.W_dec, world).groupby("kind")
    return {
        "l2": float((z - sae.decode(acts)).square().mean()),
        "mean_abs_phi": mean_abs_phi(acts > 0),
        "atoms_mean_abs_phi": mean_abs_phi(strength > 0),
        **{f"recovered {kind}": value for kind, value in found.recovered.mean().items()},
        **{f"blending {kind}": value for kind, value in found.blending.mean().items()},
    }
