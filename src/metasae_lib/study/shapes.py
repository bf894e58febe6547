"""Shapes of the language models, as far as checks and cost plans need them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from metasae_lib.study.errors import ProfileError


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


_SMOLLM2_135M = ModelShape(30, 576, 3_538_944, 49_152)
_GEMMA_3_270M = ModelShape(18, 640, 5_570_560, 262_144)
_GPT2 = ModelShape(12, 768, 7_077_888, 50_257)
_GPT2_LARGE = ModelShape(36, 1280, 19_660_800, 50_257)
_GEMMA_2_9B = ModelShape(42, 3584, 198_180_864, 256_000)
KNOWN_MODELS: dict[str, ModelShape] = {
    "embedded:smollm2-135m": _SMOLLM2_135M,
    "embedded:gemma-3-270m": _GEMMA_3_270M,
    "hub:HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "hub:HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "hub:google/gemma-3-270m": _GEMMA_3_270M,
    "hub:gpt2": _GPT2,
    "hub:openai-community/gpt2": _GPT2,
    "hub:gpt2-large": _GPT2_LARGE,
    "hub:openai-community/gpt2-large": _GPT2_LARGE,
    "hub:google/gemma-2-9b": _GEMMA_2_9B,
}


def model_shape(source: str) -> ModelShape | None:
    """Shape of a model by its profile source; None where only a download could tell.

    For a local folder, `config.json` is read and a block is taken as 12·d² parameters.
    """
    if not source.startswith("folder:"):
        return KNOWN_MODELS.get(source)
    path = Path(source.removeprefix("folder:")).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text())
        config = config.get("text_config", config)
        d_model = int(config.get("hidden_size") or config["n_embd"])
        n_layers = int(config.get("num_hidden_layers") or config["n_layer"])
        return ModelShape(n_layers, d_model, 12 * d_model**2, int(config["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ProfileError(
            f"model.source: {path} does not give a language model's layers, width and vocabulary"
        ) from None
