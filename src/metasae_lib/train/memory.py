"""What an arm needs of memory, and what to say when it is not there."""

from __future__ import annotations

from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.profile import Profile

MEMORY_SHARE = 0.7  # of the free memory that training may plan with


def arm_bytes(profile: Profile, d_in: int, spec: ArmSpec) -> int:
    """Memory that one arm holds between steps: weights, two moments each, the products' copy."""
    sizes = profile.dictionary
    features = sizes.n_features
    if spec.has_meta:
        features += sizes.n_meta_features
    return features * d_in * (6 * 4 + 2)


def step_bytes(profile: Profile, d_in: int) -> int:
    """Memory that a step needs besides, shared by all arms of a group.

    The pre-activations, as much again for the dead features' part of them and its gradient, and
    what has the size of a batch or (for a meta dictionary) of the decoder.
    """
    sizes, training = profile.dictionary, profile.training
    width = 2 if training.dtype == "bfloat16" else 4
    inputs = max(training.batch_tokens, sizes.n_features)
    features = training.batch_tokens * sizes.n_features + sizes.n_features * sizes.n_meta_features
    return 4 * width * features + 8 * 4 * inputs * d_in


def too_large(profile: Profile, d_in: int, spec: ArmSpec, free: int) -> str:
    """Why an arm cannot be trained here, and the largest sizes that could be."""

    def need(n_features: int, batch_tokens: int) -> float:
        dictionary = profile.dictionary.model_copy(update={"n_features": n_features})
        training = profile.training.model_copy(update={"batch_tokens": batch_tokens})
        smaller = profile.model_copy(update={"dictionary": dictionary, "training": training})
        return (arm_bytes(smaller, d_in, spec) + step_bytes(smaller, d_in)) / MEMORY_SHARE

    n, b = profile.dictionary.n_features, profile.training.batch_tokens
    text = (
        f"arm {spec.name} needs {need(n, b) / 2**30:.1f} GiB of free memory and "
        f"{free / 2**30:.1f} are there: "
    )
    fitting = [
        f"{key} {max(sizes):,}"
        for key, sizes in (
            ("training.batch_tokens", [x for x in _halves(b) if need(n, x) <= free]),
            ("dictionary.n_features", [x for x in _halves(n) if need(x, b) <= free]),
        )
        if sizes
    ]
    return text + (" or ".join(fitting) + " would fit" if fitting else "use a larger machine")


def _halves(size: int) -> list[int]:
    return [size >> i for i in range(1, size.bit_length())]
