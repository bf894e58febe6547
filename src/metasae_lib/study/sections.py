"""The sections of a profile: names, types and limits of every key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from metasae_lib.study.files import encodable

Negatives = Literal["random", "token", "cooccurrence"]
Role = Literal["train", "calibration", "scan", "contexts"]
ROLES: tuple[Role, ...] = get_args(Role)
# Share of the documents of each role, by their hash. Fixed, so that no role's size moves another's
# documents; near the proportions that the profiles ask for.
ROLE_SHARES: dict[Role, float] = {
    "train": 0.60, "calibration": 0.05, "scan": 0.25, "contexts": 0.10
}  # fmt: skip


def _number(value: object) -> object:
    """YAML 1.1 reads 3e-4 as text (it wants 3.0e-4): take what Python reads as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def server_address(url: str) -> str:
    """The http address of a server, as it is; ValueError for any that cannot be asked.

    A name, password or query is refused: profiles, and so their secrets, are kept with every table.
    """
    parts = urlsplit(url)
    host, port = (parts.hostname or "").encode("idna"), parts.port
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"[\s@?#]", url):
        raise ValueError("no address of a server")
    return url


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _writable(cls, value: object) -> object:
        return encodable(value) if isinstance(value, str) else value


class Model(Section):
    """The language model and the layer under study."""

    source: Annotated[str, Field(pattern=r"^(embedded|hub|folder|synthetic):\S.*$")]
    layer: Count
    dtype: Literal["bfloat16", "float32"]
    weights: Literal["as_trained", "processed"]
    batch_rows: Count


class Text(Section):
    """Where the text comes from and how it is cut. `roles`: unique tokens kept for each role.

    `max_share`: the most that a package may have of the embedded text; with 0 it is left out.
    """

    source: Annotated[
        str, Field(pattern=r"^(embedded|synthetic|hf:[^:\s][^:\n]*(:[^:\s]+)?|files:\S.*)$")
    ]
    column: str = "text"
    max_share: dict[str, Annotated[Number, Field(ge=0, le=1)]] = {}
    context_length: Annotated[int, Field(ge=2)]
    bos: Literal["every_row", "document_start", "none"]
    skip_first: bool
    seed: Seed
    roles: dict[Role, Count]

    @property
    def kept_per_row(self) -> int:
        """Tokens of a row that count, in training and in every statistic."""
        return self.context_length - int(self.skip_first)

    def packages(self, known: Iterable[str]) -> list[str]:
        """Those of the known packages of embedded text that are not left out."""
        return [package for package in known if self.max_share.get(package) != 0]


class Activations(Section):
    """How residuals are kept. `cache`: those of the training text on disk, or computed again as a
    stream. What is held out is read by many measures, and always kept."""

    cache: bool
    chunk_rows: Count

    def kept(self, role: Role) -> bool:
        """Whether the residuals of a role are kept on disk."""
        return self.cache or role != "train"


class Dictionary(Section):
    """Sizes of the primary dictionary and of its meta-SAE."""

    n_features: Annotated[int, Field(ge=2)]
    k: Count
    n_meta_features: Annotated[int, Field(ge=2)]
    meta_k: Count


class Training(Section):
    """Optimiser, phases, and the grid of arms (Eq. 2-3 and section 4 of the paper).

    `order`: whether further seeds take the tokens of a chunk in the same order as the first
    (`shared`), or each in its own (`by_seed`). The selected setting is trained at every seed, the
    rest of the grid at the first `seeds_grid`, and solo dictionaries at each k of `frontier`, which
    show what less fidelity alone does to φ, at the first `seeds_frontier` (at most all); other
    methods at the first `seeds_rivals`.
    `start`: what is taken out of the inputs, see :mod:`metasae_lib.train.start`. `given`: folders
    of SAELens dictionaries that are measured beside the arms, by names that become kinds of arm,
    see :mod:`metasae_lib.train.given`.
    `matryoshka_prefixes`: shares of the features that must rebuild the input alone, as in the main
    experiment and the ablations of Bussmann et al. 2025 (§4.3, App. G.3).
    `meta_posthoc`: settings under which a meta SAE is trained on finished decoders, see
    :mod:`metasae_lib.train.posthoc`.
    """

    train_tokens: Count
    batch_tokens: Count
    learning_rate: Positive
    meta_learning_rate: Positive
    betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    dtype: Literal["bfloat16", "float32"]
    k_aux: Count
    aux_weight: Annotated[Number, Field(ge=0)]
    dead_after: Count
    n_primary_steps: Count
    n_meta_steps: Count
    lambda2: Annotated[list[Positive], Field(min_length=1)]
    sigma_sq: Annotated[list[Positive], Field(min_length=1)]
    selected: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    seeds_grid: Count = 1
    frontier: list[Count] = []
    seeds_frontier: Count = 1
    seeds_rivals: Count = 1
    arms: Annotated[list[str], Field(min_length=1)]
    checkpoint_every: Count
    order: Literal["shared", "by_seed"] = "shared"
    start: Literal["zeros", "mean", "standard"] = "zeros"
    ortsae_weight: Positive = 0.25
    ortsae_chunk: Annotated[int, Field(ge=2)] = 8192
    jumprelu_bandwidth: Positive = 1e-3
    jumprelu_weight: Positive = 1.0
    matryoshka_prefixes: Annotated[list[Positive], Field(min_length=1)] = [
        1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0
    ]  # fmt: skip
    meta_posthoc: list[Literal["bussmann", "saebench"]] = []
    given: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], str] = {}


#: Of the scan role, in whole chunks.
FIDELITY_TOKENS = 100_000


class Evaluation(Section):
    """Choices of the measures. `ce_rows`: rows of the scan role on which CE is taken; L2, FVU and
    L0 are on its first `FIDELITY_TOKENS` tokens."""

    threshold_rule: Literal["rate", "eer", "global"]
    ce_rows: Count
    bootstrap: Count


class Autointerp(Section):
    """Who explains and judges features, and how much is asked.

    `judge`: `lexical` (no model), `embedding` (a sentence encoder, `model` as in `model.source`),
    `in-process` (a language model, likewise), or `http` (an OpenAI-compatible server at `url`,
    `model` by its name there). `explainer`: token lists (`lexical`), or sentences by the judge, or
    by `explainer_model` in this process or at `url`. `features`: matched pairs of each seed that
    are judged, of at least a decoder `cosine`. `negatives`: the text in which a feature is silent,
    drawn at random, or near misses that hold its usual peak token, or in which the feature fires
    that most often fires beside it.
    """

    judge: Literal["lexical", "embedding", "in-process", "http"] = "lexical"
    explainer: Literal["lexical", "judge", "in-process", "http"] = "lexical"
    model: str = "embedded:all-minilm-l6-v2"
    explainer_model: str = "embedded:qwen2.5-coder-0.5b"
    url: Annotated[str, AfterValidator(server_address)] = "http://127.0.0.1:8000/v1"
    parallel: Count = 16
    features: Count = 500
    window: Count = 16
    explain_examples: Annotated[int, Field(ge=5, multiple_of=5)] = 10
    score_examples: Annotated[int, Field(ge=5, multiple_of=5)] = 5
    rounds: Count = 4
    negatives: Negatives = "random"
    cosine: Annotated[Number, Field(ge=-1, le=1)] = 0.5

    @property
    def models(self) -> dict[str, str]:
        """Sources of the models that judge and explain in this process, by their keys here."""
        found = {}
        if self.judge in ("embedding", "in-process"):
            found["model"] = self.model
        if self.explainer == "in-process":
            found["explainer_model"] = self.explainer_model
        return found
