"""Which arms a profile asks for: a dictionary each, under one condition of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metasae_lib.study.profile import Profile


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
        if self.k is not None and self.kind != "matched-fidelity":  # its k is found, not asked for
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
        """Whether a meta SAE is trained along. (A matched-fidelity arm only names its target.)"""
        return self.sigma_sq is not None and self.kind != "matched-fidelity"


def _order(profile: Profile, seed: int) -> int:
    by_seed = profile.training.order == "by_seed" and seed != profile.training.seeds[0]
    return seed if by_seed else 0


def _solo(profile: Profile) -> list[ArmSpec]:
    return [ArmSpec("solo", seed, order=_order(profile, seed)) for seed in profile.training.seeds]


def _joint(profile: Profile) -> list[ArmSpec]:
    first, *others = profile.training.seeds
    grid = [
        ArmSpec("joint", first, lambda2, sigma_sq)
        for lambda2 in profile.training.lambda2
        for sigma_sq in profile.training.sigma_sq
    ]
    return grid + [
        ArmSpec("joint", seed, *profile.selected, order=_order(profile, seed)) for seed in others
    ]


def _control(profile: Profile) -> list[ArmSpec]:
    return [
        ArmSpec("control", profile.training.seeds[0], 0.0, sigma_sq)
        for sigma_sq in profile.training.sigma_sq
    ]


def _solo_and_joint(profile: Profile, kind: str, **fields: Any) -> list[ArmSpec]:
    """The first seed without and with the penalty of the selected configuration."""
    seed = profile.training.seeds[0]
    return [ArmSpec(kind, seed, **fields), ArmSpec(kind, seed, *profile.selected, **fields)]


def _jumprelu(profile: Profile) -> list[ArmSpec]:
    return _solo_and_joint(profile, "jumprelu")


def _ablation(profile: Profile) -> list[ArmSpec]:
    """With solo and joint, eight configurations: architecture × penalty × (k, k/2).

    The paper names the number of its configurations (§4), not what they are.
    """
    half = max(1, profile.dictionary.k // 2)
    return [
        *_jumprelu(profile),
        *_solo_and_joint(profile, "jumprelu", k=half),
        *_solo_and_joint(profile, "batchtopk", k=half),
    ]


def _ortsae(profile: Profile) -> list[ArmSpec]:
    return [ArmSpec("ortsae", profile.training.seeds[0])]


def _matched_fidelity(profile: Profile) -> list[ArmSpec]:
    return [ArmSpec("matched-fidelity", profile.training.seeds[0], *profile.selected)]


def _as_released(profile: Profile) -> list[ArmSpec]:
    solo, joint = _solo_and_joint(profile, "as-released")
    return [solo, replace(joint, meta_k=_released_meta_k(profile), phases=(100, 10))]


def _critic(profile: Profile) -> list[ArmSpec]:
    """The selected configuration with either choice of the released code for its meta SAE."""
    joint = ArmSpec("critic", profile.training.seeds[0], *profile.selected)
    return [replace(joint, meta_k=_released_meta_k(profile)), replace(joint, phases=(100, 10))]


def _released_meta_k(profile: Profile) -> int:
    """Half of the text's (8 in the text, 4 in the released code)."""
    return max(1, profile.dictionary.meta_k // 2)


# A further kind of arm is one more function here. An arm that two of them ask for is one arm.
ARM_KINDS: dict[str, Callable[[Profile], list[ArmSpec]]] = {
    "solo": _solo,
    "joint": _joint,
    "control": _control,
    "jumprelu": _jumprelu,
    "ablation": _ablation,
    "ortsae": _ortsae,
    "matched-fidelity": _matched_fidelity,
    "as-released": _as_released,
    "critic": _critic,
}
