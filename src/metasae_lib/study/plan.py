"""What a profile costs before anything is spent: memory, disk and time by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metasae_lib.study.errors import ProfileError
from metasae_lib.study.known import ModelShape
from metasae_lib.study.machine import hardware
from metasae_lib.study.profile import Profile


@dataclass(frozen=True)
class Machine:
    """Assumed sustained speeds of one device: teraFLOP/s, billions of counts/s, gigabytes."""

    model: float
    dictionary: float
    counts: float
    memory: float


def machines() -> dict[str, Machine]:
    """What plans assume: a third of the peak in bf16 for the model, less for dictionaries.

    A dictionary's step moves matrices of batch × n more than it multiplies them. `cpu` is two
    cores without matrix units, with this machine's memory; its dictionaries were measured, with
    kernels that leave out most of the products counted here.
    """
    here = hardware()["memory_gib"] * 2**30 / 1e9
    return {
        "h100": Machine(model=300, dictionary=100, counts=10, memory=80),
        "h200": Machine(model=300, dictionary=130, counts=10, memory=141),
        "a100": Machine(model=100, dictionary=50, counts=5, memory=80),
        "cpu": Machine(model=0.25, dictionary=0.4, counts=0.2, memory=here),
    }


def plan_text(profile: Profile, names: Sequence[str]) -> str:
    """The plan as aligned lines, one column of times a machine. Needs no download."""
    shape = profile.shape
    if shape is None:
        raise ProfileError(
            f"profile {profile.name}: the shape of {profile.model.source} is not known here; "
            f"download the model and plan with model.source folder:<path>"
        )
    size, n_arms = sizes(profile, shape), len(profile.arms())
    chosen = {name: machines()[name] for name in names}
    fitting, times = {}, []
    for name, machine in chosen.items():
        at_once = arms_at_once(profile, size, machine)
        if min(at_once) > 0:
            fitting[name] = at_once
            times.append(stage_seconds(profile, shape, machine, *at_once))
    if not fitting:
        least = size["model"] + size["batch"] + max(size["training"], size["counting"])
        raise ProfileError(
            f"profile {profile.name}: about {_size(least / 0.9)} of memory are needed, more than "
            f"{' or '.join(names)} has: choose a larger machine"
        )
    rows = [
        ["", *fitting],
        *([stage, *(_time(column[stage]) for column in times)] for stage in times[0]),
        ["in all", *(_time(sum(column.values())) for column in times)],
        ["arms trained at once", *(f"{trained}/{n_arms}" for trained, _ in fitting.values())],
        ["arms counted at once", *(f"{counted}/{n_arms}" for _, counted in fitting.values())],
    ]
    width = max(len(row[0]) for row in rows)
    tokens = sum(profile.text.roles.values())
    facts = {
        "text": f"{tokens / 1e6:.2f}M tokens, of {profile.text.source}",
        "steps": f"{profile.steps:,} of {profile.training.batch_tokens:,} tokens",
        "language model": f"{_size(size['model'])} of memory",
        "... while it is loaded": f"up to {_size(size['loading'])} of host memory",
        "one arm in training": f"{_size(size['training'])} of memory, with Adam",
        "one batch": f"{_size(size['batch'])} of memory",
        "counts of one arm": f"{_size(size['counts'])} of memory",
        "cached residuals": f"{_size(size['cache'])} of disk",
        "arms and counts": f"{_size(size['results'])} of disk",
    }
    assumed = "; ".join(
        f"{name} {machine.model:g} and {machine.dictionary:g} TFLOP/s"
        for name, machine in chosen.items()
    )
    return "\n".join(
        [
            f"{profile.name}: {profile.about}",
            "",
            *(row[0].ljust(width) + "".join(cell.rjust(11) for cell in row[1:]) for row in rows),
            *(f"{name}: too little memory" for name in chosen if name not in fitting),
            "",
            *(label.ljust(width + 2) + fact for label, fact in facts.items()),
            "",
            f"Assumed, sustained, for the model and for the dictionaries: {assumed}.",
            "Products of the dictionaries are counted dense.",
        ]
    )


def arms_at_once(profile: Profile, size: Mapping[str, int], machine: Machine) -> tuple[int, int]:
    """Arms trained and arms counted at once: those that fit in nine tenths of the memory, beside
    model and batch."""
    room = 0.9 * machine.memory * 1e9 - size["model"] - size["batch"]
    trained, counted = (int(room // size[use]) for use in ("training", "counting"))
    return min(len(profile.arms()), trained), min(len(profile.arms()), counted)


def sizes(profile: Profile, shape: ModelShape) -> dict[str, int]:
    """Bytes of memory of the model, loaded and while it is loaded, of a batch and of an arm; of
    disk for the cached residuals and for all arms."""
    n, n_meta = profile.dictionary.n_features, profile.dictionary.n_meta_features
    element = 2 if profile.model.dtype == "bfloat16" else 4
    weights, counts = 4 * 2 * shape.d_model * (n + n_meta), 4 * n**2  # float32 and int32
    cached = sum(profile.text.roles.values()) if profile.activations.cache else 0
    return {
        "model": shape.parameters * element,
        # As trained: the file, in float32 at worst, and its copy. Processed: folding and centring
        # in float32 hold 3.5 of it (measured on GPT-2 large's shapes: 4.7 and 10.9 GB).
        "loading": shape.parameters * (14 if profile.model.weights == "processed" else 4 + element),
        # The pre-activations in float32, their gradient, and a bf16 copy.
        "batch": 10 * profile.training.batch_tokens * n,
        "training": 4 * weights,  # with gradients and two Adam moments
        "counts": counts,
        "counting": weights + counts,
        "cache": cached * shape.d_model * element,
        "results": len(profile.arms()) * (3 * weights + counts),  # with moments
    }


def stage_seconds(
    profile: Profile, shape: ModelShape, machine: Machine, trained: int, counted: int
) -> dict[str, float]:
    """Seconds of every stage on a machine that trains and counts so many arms at once.

    Products are counted dense, two operations a multiply-add, so times are upper bounds for
    sparse kernels.
    """
    text, roles, training = profile.text, profile.text.roles, profile.training
    arms, layer = profile.arms(), profile.model.layer
    # Arms that do not fit together see the text again; position 0 is computed even if unused.
    train, scan = training.train_tokens * -(-len(arms) // trained), roles["scan"]
    if profile.activations.cache:
        train = roles["train"]
    else:
        scan *= -(-len(arms) // counted)
    # FLOP a token: through a block (weights, and attention over the context), and d × n.
    block = 2 * shape.block_parameters + 4 * text.context_length * shape.d_model
    to_layer = layer * block * text.context_length / text.kept_per_row
    whole = shape.n_layers * block + 2 * shape.d_model * shape.vocabulary
    product = 2 * shape.d_model * profile.dictionary.n_features
    # A primary step: six products a token. With a penalty, the meta-SAE sees the n decoder rows:
    # two products for its output at every primary step, six for a step of its own.
    share = training.n_meta_steps / training.n_primary_steps
    step = 6 * product * training.batch_tokens
    penalty = (2 + 6 * share) * product * profile.dictionary.n_meta_features
    steps = sum(step if arm.sigma_sq is None else step + penalty for arm in arms)
    counts = len(arms) * roles["scan"] * profile.dictionary.k**2 / 2
    encoded = len(arms) * (roles["calibration"] + roles["scan"])
    ce_tokens = (len(arms) + 1) * profile.evaluation.ce_rows * text.context_length
    model, dictionary = machine.model * 1e12, machine.dictionary * 1e12
    return {
        f"model to layer {layer}, training text": train * to_layer / model,
        "model to it, other roles": (
            (scan + roles["calibration"] + roles["contexts"]) * to_layer / model
        ),
        f"training, {len(arms)} arms": steps * profile.steps / dictionary,
        "calibration and scan": encoded * product / dictionary + counts / (machine.counts * 1e9),
        "cross-entropy": ce_tokens * whole / model,
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:,.1f} h"


def _size(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:,.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
