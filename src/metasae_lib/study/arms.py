"""Which arms a profile asks for: a dictionary each, under one condition of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metasae_lib.study.profile import Profile

#: Other methods against what the penalty is against: features that are no atoms.
COMPETITORS = ("ortsae", "matryoshka")


@dataclass(frozen=True)
class ArmSpec:
    """One condition under which a dictionary is trained; None: as the profile's sections say.

    k: mean activations per input. meta_k, phases (primary, meta steps): of the meta SAE. order:
    seed of the order in which the tokens of a chunk are taken.
    """

    kind: str
    seed: int
    lambda2: float | None = None
    sigma_sq: float | None = None
    k: int | None = None
    meta_k: int | None = None
    phases: tuple[int, int] | None = None
    order: int = 0

    @property
    def name(self) -> str:
        """Such as `solo-seed0`, `joint-lambda0.3-sigma1-seed0`, `jumprelu-k16-seed0`."""
        parts = [self.kind]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.kind == "critic":
            parts += [f"k{self.meta_k}"] if self.meta_k is not None else []
            parts += ["steps{}to{}".format(*self.phases)] if self.phases is not None else []
        if self.lambda2:  # a control has λ₂ = 0, which its kind already says
            parts.append(f"lambda{self.lambda2:g}")
        if self.sigma_sq is not None:
            parts.append(f"sigma{self.sigma_sq:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def has_meta(self) -> bool:
        """Whether a meta SAE is trained along."""
        return self.sigma_sq is not None


def arms_by_kind(profile: Profile) -> dict[str, list[ArmSpec]]:
    """The arms of every kind that `training.arms` may name. A further kind is one more entry.

    `ablation`: with solo and joint, eight configurations: architecture × penalty × (k, k/2). The
    paper names the number of its configurations (§4), not what they are. `critic`: the selected
    configuration with either choice of the released code for its meta SAE. `control`: one, since a
    penalty of weight zero leaves the weights alone whatever its σ². `frontier`: solo at smaller k.
    `zero-start`: solo as the paper starts it, in a profile with another `training.start`.
    """
    training = profile.training
    seeds, first = training.seeds, training.seeds[0]
    by_seed = training.order == "by_seed"
    orders = {seed: seed if by_seed and seed != first else 0 for seed in seeds}
    half = max(1, profile.dictionary.k // 2)
    meta_k = max(1, profile.dictionary.meta_k // 2)  # 8 in the text, 4 in the released code

    def pair(kind: str, **fields: Any) -> list[ArmSpec]:
        """The first seed without and with the penalty of the selected configuration."""
        return [ArmSpec(kind, first, **fields), ArmSpec(kind, first, *profile.selected, **fields)]

    solo, joint = pair("as-released")
    critic = ArmSpec("critic", first, *profile.selected)
    return {
        "solo": [ArmSpec("solo", seed, order=orders[seed]) for seed in seeds],
        "joint": [
            *(
                ArmSpec("joint", seed, a, b, order=orders[seed])
                for seed in seeds[: training.seeds_grid]
                for a in training.lambda2
                for b in training.sigma_sq
            ),
            *(ArmSpec("joint", seed, *profile.selected, order=orders[seed]) for seed in seeds),
        ],
        "control": [ArmSpec("control", first, 0.0, profile.selected[1])],
        "frontier": [
            ArmSpec("frontier", seed, k=k, order=orders[seed])
            for seed in seeds[: training.seeds_frontier]
            for k in training.frontier
        ],
        "zero-start": [ArmSpec("zero-start", first)],
        "jumprelu": pair("jumprelu"),
        "ablation": pair("jumprelu") + pair("jumprelu", k=half) + pair("batchtopk", k=half),
        **{
            kind: [ArmSpec(kind, s, order=orders[s]) for s in seeds[: training.seeds_rivals]]
            for kind in COMPETITORS
        },
        "as-released": [solo, replace(joint, meta_k=meta_k, phases=(100, 10))],
        "critic": [replace(critic, meta_k=meta_k), replace(critic, phases=(100, 10))],
    }
