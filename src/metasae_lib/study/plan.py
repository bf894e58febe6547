"""What a profile costs before anything is spent: memory, disk and time by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import ProfileError
from metasae_lib.study.machine import hardware
from metasae_lib.study.profile import Profile
from metasae_lib.study.shapes import ModelShape


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


@dataclass(frozen=True)
class Plan:
    """What a profile costs before anything is spent; memory and disk in bytes.

    Products are counted dense, two operations a multiply-add, so times are upper bounds for
    sparse kernels.
    """

    profile: Profile
    shape: ModelShape
    arms: list[ArmSpec]

    @property
    def model_bytes(self) -> int:
        """Parameters of the whole language model in its dtype."""
        return self.shape.parameters * self._element_bytes

    @property
    def arm_bytes(self) -> int:
        """Parameters, gradients and two Adam moments of a joint arm, all float32."""
        sizes = self.profile.dictionary
        features = sizes.n_features + sizes.n_meta_features
        return 16 * 2 * self.shape.d_model * features

    @property
    def step_bytes(self) -> int:
        """The pre-activations of one batch in float32, their gradient, and a bf16 copy."""
        return 10 * self.profile.training.batch_tokens * self.profile.dictionary.n_features

    @property
    def count_bytes(self) -> int:
        """int32 co-occurrence counts of one arm."""
        return 4 * self.profile.dictionary.n_features**2

    @property
    def scanned_bytes(self) -> int:
        """Weights and counts of one arm."""
        return self.arm_bytes // 4 + self.count_bytes

    @property
    def cache_bytes(self) -> int:
        """Cached residuals of every role."""
        if not self.profile.activations.cache:
            return 0
        tokens = sum(self.profile.text.roles.values())
        return tokens * self.shape.d_model * self._element_bytes

    @property
    def result_bytes(self) -> int:
        """On disk: weights, moments and counts of every arm."""
        return len(self.arms) * (3 * self.arm_bytes // 4 + self.count_bytes)

    def at_once(self, machine: Machine, each: int) -> int:
        """Arms of `each` bytes that fit in nine tenths of the memory, beside model and batch."""
        free = 0.9 * machine.memory * 1e9 - self.model_bytes - self.step_bytes
        return max(0, min(len(self.arms), int(free // each)))

    def trained_at_once(self, machine: Machine) -> int:
        """Arms that one pass over the text can train."""
        return self.at_once(machine, self.arm_bytes)

    def scanned_at_once(self, machine: Machine) -> int:
        """Arms whose co-occurrences one pass over the text can count."""
        return self.at_once(machine, self.scanned_bytes)

    def fits(self, machine: Machine) -> bool:
        """Whether at least one arm can be trained, and one counted."""
        return min(self.trained_at_once(machine), self.scanned_at_once(machine)) > 0

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds of every stage, on a machine that it fits."""
        text, roles, arms = self.profile.text, self.profile.text.roles, len(self.arms)
        layer, cached = self.profile.model.layer, self.profile.activations.cache
        model, dictionary = machine.model * 1e12, machine.dictionary * 1e12
        # Arms that do not fit together see the text again; position 0 is computed even if unused.
        trainings = -(-arms // self.trained_at_once(machine))
        scans = -(-arms // self.scanned_at_once(machine))
        train = roles["train"] if cached else self.profile.training.train_tokens * trainings
        scan = roles["scan"] if cached else roles["scan"] * scans
        other = scan + roles["calibration"] + roles["contexts"]
        per_token = self._pass_flop(layer) * text.context_length / text.kept_per_row
        encoded = arms * (roles["calibration"] + roles["scan"])
        counted = arms * roles["scan"] * self.profile.dictionary.k**2 / 2
        ce_tokens = (arms + 1) * self.profile.evaluation.ce_rows * text.context_length
        whole = self._pass_flop(self.shape.n_layers) + self._head_flop
        train_flop = sum(self._arm_flop(arm) for arm in self.arms) * self.profile.steps
        return {
            f"model to layer {layer}, training text": train * per_token / model,
            "model to it, other roles": other * per_token / model,
            f"training, {arms} arms": train_flop / dictionary,
            "calibration and scan": (
                encoded * self._product / dictionary + counted / (machine.counts * 1e9)
            ),
            "cross-entropy": ce_tokens * whole / model,
        }

    @property
    def _element_bytes(self) -> int:
        return 2 if self.profile.model.dtype == "bfloat16" else 4

    @property
    def _product(self) -> int:
        """FLOP of one token's product with a d × n matrix."""
        return 2 * self.shape.d_model * self.profile.dictionary.n_features

    @property
    def _head_flop(self) -> int:
        return 2 * self.shape.d_model * self.shape.vocabulary

    def _pass_flop(self, layers: int) -> int:
        """FLOP a token through some blocks: weights, and attention over the context."""
        attention = 4 * self.profile.text.context_length * self.shape.d_model
        return layers * (2 * self.shape.block_parameters + attention)

    def _arm_flop(self, arm: ArmSpec) -> float:
        """FLOP of one primary step with its share of meta steps.

        Six products a token. With a penalty, the meta-SAE sees the n decoder rows: two products
        for its output at every primary step, six for a step of its own.
        """
        sizes, training = self.profile.dictionary, self.profile.training
        primary = 6 * self._product * training.batch_tokens
        if arm.sigma_sq is None:
            return primary
        share = training.n_meta_steps / training.n_primary_steps
        return primary + (2 + 6 * share) * self._product * sizes.n_meta_features


def plan_text(profile: Profile, names: Sequence[str]) -> str:
    """The plan as aligned lines, one column of times a machine. Needs no download."""
    if profile.shape is None:
        raise ProfileError(
            f"profile {profile.name}: the shape of {profile.model.source} is not known here; "
            f"download the model and plan with model.source folder:<path>"
        )
    plan = Plan(profile, profile.shape, profile.arms())
    chosen = {name: machines()[name] for name in names}
    fitting = {name: machine for name, machine in chosen.items() if plan.fits(machine)}
    if not fitting:
        largest = max(plan.arm_bytes, plan.scanned_bytes)
        least = plan.model_bytes + plan.step_bytes + largest
        raise ProfileError(
            f"profile {profile.name}: about {_bytes(least / 0.9)} of memory are needed, more than "
            f"{' or '.join(names)} has: choose a larger machine"
        )
    times = {name: plan.seconds(machine) for name, machine in fitting.items()}
    rows = [["", *times]]
    for stage in next(iter(times.values())):
        rows.append([stage, *(_time(column[stage]) for column in times.values())])
    rows.append(["in all", *(_time(sum(column.values())) for column in times.values())])
    for label, fit in [
        ("arms trained at once", plan.trained_at_once),
        ("arms counted at once", plan.scanned_at_once),
    ]:
        rows.append([label, *(f"{fit(machine)}/{len(plan.arms)}" for machine in fitting.values())])
    width = max(len(row[0]) for row in rows)
    table = [row[0].ljust(width) + "".join(cell.rjust(11) for cell in row[1:]) for row in rows]
    assumed = "; ".join(
        f"{name} {machine.model:g} and {machine.dictionary:g} TFLOP/s"
        for name, machine in chosen.items()
    )
    tokens = sum(profile.text.roles.values())
    memory = [
        ("text", f"{tokens / 1e6:.2f}M tokens, of {profile.text.source}"),
        ("steps", f"{profile.steps:,} of {profile.training.batch_tokens:,} tokens"),
        ("language model", f"{_bytes(plan.model_bytes)} of memory"),
        ("one arm in training", f"{_bytes(plan.arm_bytes)} of memory, with Adam"),
        ("one batch", f"{_bytes(plan.step_bytes)} of memory"),
        ("counts of one arm", f"{_bytes(plan.count_bytes)} of memory"),
        ("cached residuals", f"{_bytes(plan.cache_bytes)} of disk"),
        ("arms and counts", f"{_bytes(plan.result_bytes)} of disk"),
    ]
    return "\n".join(
        [
            f"{profile.name}: {profile.about}",
            "",
            *table,
            *(f"{name}: too little memory" for name in chosen if name not in fitting),
            "",
            *(label.ljust(width + 2) + value for label, value in memory),
            "",
            f"Assumed, sustained, for the model and for the dictionaries: {assumed}.",
            "Products of the dictionaries are counted dense.",
        ]
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:,.1f} h"


def _bytes(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:,.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
