"""What a profile costs before anything is spent: memory, disk and time by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import ProfileError
from metasae_lib.study.known import ModelShape
from metasae_lib.study.machine import hardware
from metasae_lib.study.profile import Profile
from metasae_lib.study.sections import FIDELITY_TOKENS

MEMORY_SHARE = 0.8  # of the free memory that training, or counts of pairs, may plan with


@dataclass(frozen=True)
class Costs:
    """Seconds of the units that stages are made of; the machine's memory in gigabytes, and whether
    it is that of a GPU.

    block, head: a token in one block of the language model, and its cross-entropy from the last
    hidden state. solo, joint: a training step, with its share of the meta phase. calibration, scan,
    reconstruction: a token of one arm.
    """

    block: float
    head: float
    solo: float
    joint: float
    calibration: float
    scan: float
    reconstruction: float
    memory: float
    gpu: bool


@dataclass(frozen=True)
class Machine:
    """Sustained speeds of one device: teraFLOP/s, milliseconds, billions of counts/s, gigabytes.

    meta: of what the penalty adds to a step. start: what the step of a dictionary takes however
    small it is, and a penalty again.
    """

    model: float
    dictionary: float
    meta: float
    start: float
    counts: float
    memory: float
    gpu: bool = True

    def costs(self, profile: Profile, shape: ModelShape) -> Costs:
        """Of products counted dense, two operations a multiply-add."""
        training, d = profile.training, shape.d_model
        model, dictionary = self.model * 1e12, self.dictionary * 1e12
        # Through a block: weights, and attention over the context.
        block = 2 * shape.block_parameters + 4 * profile.text.context_length * d
        product = 2 * d * profile.dictionary.n_features
        # A primary step: six products a token. With a penalty, the meta-SAE sees the n decoder
        # rows: two products for its output at every primary step, six for a step of its own.
        solo = self.start / 1e3 + 6 * product * training.batch_tokens / dictionary
        share = training.n_meta_steps / training.n_primary_steps
        products = (2 + 6 * share) * product * profile.dictionary.n_meta_features
        joint = solo + self.start / 1e3 + products / (self.meta * 1e12)
        counts = profile.dictionary.k**2 / 2 / (self.counts * 1e9)
        return Costs(
            block / model,
            2 * d * shape.vocabulary / model,
            solo,
            joint,
            product / dictionary,
            product / dictionary + counts,
            2 * product / dictionary,
            self.memory,
            self.gpu,
        )


def machines() -> dict[str, Machine]:
    """What plans assume: a third of the peak in bf16 for the model.

    The steps of an `h200` were measured (book/scale/gpu.csv), those of the other GPUs follow from
    them; a penalty moves matrices more than it multiplies them. `cpu` is two cores without matrix
    units, with this machine's memory; its dictionaries were measured, with kernels that leave out
    most of the products counted here. What this machine does with a profile is measured by
    `measure.speed`.
    """
    here = hardware()["memory_gib"] * 2**30 / 1e9
    return {
        "h100": Machine(model=300, dictionary=300, meta=60, start=0.42, counts=10, memory=80),
        "h200": Machine(model=300, dictionary=365, meta=75, start=0.42, counts=10, memory=141),
        "a100": Machine(model=100, dictionary=120, meta=35, start=0.5, counts=5, memory=80),
        "cpu": Machine(
            model=0.25, dictionary=0.4, meta=0.4, start=0, counts=0.2, memory=here, gpu=False
        ),
    }


def shape_of(profile: Profile) -> ModelShape:
    """The shape that a plan is made from. Raises ProfileError where only a download tells it."""
    if profile.shape is None:
        raise ProfileError(
            f"profile {profile.name}: the shape of {profile.model.source} is not known here; "
            f"download the model and plan with model.source folder:<path>"
        )
    return profile.shape


def plan_text(profile: Profile, names: Sequence[str], here: Costs | None = None) -> str:
    """The plan as aligned lines, one column of times a machine. Needs no download.

    names: of :func:`machines`. here: what was measured on this machine, the first column.
    """
    shape = shape_of(profile)
    assumed = {name: machines()[name] for name in names}
    chosen = {"here": here} if here else {}
    chosen |= {name: machine.costs(profile, shape) for name, machine in assumed.items()}
    fitting = fitting_machines(profile, chosen)
    times = [
        stage_seconds(profile, shape, chosen[name], trained)
        for name, (trained, _) in fitting.items()
    ]
    size = sizes(profile, shape, any(chosen[name].gpu for name in fitting))
    n_arms = len(profile.arms())
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
        "a training step": f"{_size(size['step'])} of memory besides",
        "counts of one arm": f"{_size(size['counts'])} of memory",
        "cached residuals": f"{_size(size['cache'])} of disk",
        "arms and counts": f"{_size(size['results'])} of disk",
    }
    rates = "; ".join(
        f"{name} {machine.model:g} and {machine.dictionary:g} TFLOP/s"
        for name, machine in assumed.items()
    )
    return "\n".join(
        [
            f"{profile.name}: {profile.about}",
            "",
            *(row[0].ljust(width) + "".join(cell.rjust(11) for cell in row[1:]) for row in rows),
            *(
                f"{name}: too little memory; {_smaller(profile, chosen[name])}"
                for name in chosen
                if name not in fitting
            ),
            "",
            *(label.ljust(width + 2) + fact for label, fact in facts.items()),
            "",
            *(["Measured: here, a few of each unit at the profile's sizes."] if here else []),
            *(
                [
                    f"Assumed, sustained, for the model and for the dictionaries: {rates}"
                    + ("; its steps were measured." if list(assumed) == ["h200"] else "."),
                    "Products of the dictionaries are counted dense.",
                ]
                if rates
                else []
            ),
            "Judging, starting notebooks and drawing are not counted.",
        ]
    )


def hours(profile: Profile, machine: str) -> float:
    """Hours of all stages of a profile on one of :func:`machines`, by what it assumes."""
    shape = shape_of(profile)
    costs = machines()[machine].costs(profile, shape)
    trained, _ = arms_at_once(profile, shape, costs)
    return sum(stage_seconds(profile, shape, costs, trained).values()) / 3600


def fitting_machines(
    profile: Profile, candidates: Mapping[str, Machine | Costs]
) -> dict[str, tuple[int, int]]:
    """What :func:`arms_at_once` gives for those of some machines that hold one arm.

    Raises ProfileError if none does.
    """
    shape = shape_of(profile)
    at_once = {name: arms_at_once(profile, shape, one) for name, one in candidates.items()}
    if fitting := {name: arms for name, arms in at_once.items() if min(arms) > 0}:
        return fitting
    largest = max(candidates.values(), key=lambda one: one.memory)
    size = sizes(profile, shape, largest.gpu)
    least = max(size["step"] + size["training"], size["batch"] + size["counting"])
    raise ProfileError(
        f"profile {profile.name}: about {_size((size['model'] + least) / MEMORY_SHARE)} of memory "
        f"are needed, more than {' or '.join(candidates)} has: {_smaller(profile, largest)}"
    )


def _smaller(profile: Profile, machine: Machine | Costs) -> str:
    """What to change so that a machine holds one arm."""
    shape = shape_of(profile)
    for n in (profile.dictionary.n_features >> i for i in range(1, 8)):
        dictionary = profile.dictionary.model_copy(update={"n_features": n})
        smaller = profile.model_copy(update={"dictionary": dictionary})
        if min(arms_at_once(smaller, shape, machine)) > 0:
            return f"set dictionary.n_features to {n:,}, or choose a larger machine"
    return "choose a larger machine"


def arms_at_once(profile: Profile, shape: ModelShape, machine: Machine | Costs) -> tuple[int, int]:
    """Arms trained and arms counted at once: those that fit beside the model in what may be
    planned with."""
    size = sizes(profile, shape, machine.gpu)
    room = MEMORY_SHARE * machine.memory * 1e9 - size["model"]
    trained = int((room - size["step"]) // size["training"])
    counted = int((room - size["batch"]) // size["counting"])
    return min(len(profile.arms()), trained), min(len(profile.arms()), counted)


def arm_bytes(profile: Profile, d_in: int, spec: ArmSpec, gpu: bool) -> int:
    """Memory that one arm holds between steps: weights, two moments each, the products' copy; on a
    GPU what a penalty pulls with, where its graph leaves it and where the step's finds it."""
    sizes = profile.dictionary
    features = sizes.n_features + (sizes.n_meta_features if spec.has_meta else 0)
    pull = sizes.n_features * 2 * 4 if gpu and spec.has_meta else 0
    return (features * (6 * 4 + 2) + pull) * d_in


def step_bytes(profile: Profile, d_in: int, gpu: bool) -> int:
    """Memory that a step needs besides, shared by the arms of a group, when all features are dead.

    Pre-activations, as much twice for the dead features' part of them and its gradient, rows of
    these with their gradients, a pull on the decoder, the meta dictionary's pre-activations, and
    what has the size of a batch. With `arm_bytes`, the peak on two cores is 0.91 to 1.08 of this at
    d 1,280 and 3,584 and n 8,192 to 32,768. A GPU, whose plain products hold more and whose graphs
    keep what they pass on, is given twice that; it was not measured.
    """
    sizes, training = profile.dictionary, profile.training
    width, n = 2 if training.dtype == "bfloat16" else 4, sizes.n_features
    low = 3 * training.batch_tokens * n + n * sizes.n_meta_features + 2 * n * d_in
    exact = 3 * n * d_in + 8 * training.batch_tokens * d_in
    return (width * low + 4 * exact) * (2 if gpu else 1)


def sizes(profile: Profile, shape: ModelShape, gpu: bool) -> dict[str, int]:
    """Bytes of memory of the model, loaded and while it is loaded, of an arm and a step in
    training, of an arm that is counted, and of a batch then; of disk for the cached residuals and
    for all arms."""
    n, n_meta, d = profile.dictionary.n_features, profile.dictionary.n_meta_features, shape.d_model
    element = 2 if profile.model.dtype == "bfloat16" else 4
    weights, counts = 4 * 2 * d * (n + n_meta), 4 * n**2  # float32 and int32
    kept, roles = profile.activations.kept, profile.text.roles
    cached = sum(tokens for role, tokens in roles.items() if kept(role))
    return {
        "model": shape.parameters * element,
        # As trained: the file, in float32 at worst, and its copy. Processed: folding and centring
        # in float32 hold 3.5 of it (measured on GPT-2 large's shapes: 4.7 and 10.9 GB).
        "loading": shape.parameters * (14 if profile.model.weights == "processed" else 4 + element),
        "training": max(arm_bytes(profile, d, arm, gpu) for arm in profile.arms()),
        "step": step_bytes(profile, d, gpu),
        "counts": counts,
        "counting": weights + counts,
        # Its pre-activations: in float32, compared, and a bf16 copy. Of one arm at a time.
        "batch": 10 * profile.training.batch_tokens * n,
        "cache": cached * d * element,
        "results": len(profile.arms()) * (3 * weights + counts),  # with moments
    }


def stage_seconds(
    profile: Profile, shape: ModelShape, costs: Costs, trained: int
) -> dict[str, float]:
    """Seconds of every stage on a machine that trains so many arms at once."""
    text, roles, rows = profile.text, profile.text.roles, profile.evaluation.ce_rows
    arms, layer = profile.arms(), profile.model.layer
    to_train = len(arms) - len(profile.training.given)
    # Arms that do not fit together see the text again; position 0 is computed even if unused.
    train = profile.training.train_tokens * -(-to_train // trained)
    if profile.activations.cache:
        train = roles["train"]
    held_out = sum(roles.values()) - roles["train"]
    to_layer = layer * costs.block * text.context_length / text.kept_per_row
    joint = sum(arm.sigma_sq is not None for arm in arms)
    steps = (to_train - joint) * costs.solo + joint * costs.joint
    # The blocks before the layer run once, those behind it for each arm: at its thresholds, and
    # on one batch of rows in training mode.
    behind = (shape.n_layers - layer) * costs.block + costs.head
    passes = 1 + len(arms) * (1 + min(1, profile.model.batch_rows / rows))
    ce = rows * text.context_length * (layer * costs.block + passes * behind)
    errors = len(arms) * min(FIDELITY_TOKENS, roles["scan"]) * costs.reconstruction
    return {
        f"residuals, training, layer {layer}": train * to_layer,
        "residuals, other roles": held_out * to_layer,
        f"training, {to_train} arms": steps * profile.steps,
        "thresholds": len(arms) * roles["calibration"] * costs.calibration,
        "counts": len(arms) * roles["scan"] * costs.scan,
        "fidelity": errors + ce,
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:,.1f} h"


def _size(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:,.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
