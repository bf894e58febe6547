"""The rehearsal's language models have the shapes of the real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metasae_lib import Profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))

from rehearse import SMALL, config_of


@pytest.mark.parametrize(
    ("name", "millions"),  # as their authors count them, GPT-2's with 1,024 positions
    [("gpt2-large", 774), ("gemma-2-9b", 9242)],
)
def test_random_models_have_the_real_shapes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert round(model.num_parameters() / 1e6) == millions
    shape, text = Profile.load(name).shape, model.config.get_text_config()
    assert shape is not None
    assert (text.num_hidden_layers, text.hidden_size) == (shape.n_layers, shape.d_model)
    assert text.vocab_size == shape.vocabulary
    assert model.num_parameters() == pytest.approx(shape.parameters, rel=0.01)


def test_only_what_is_small_is_changed() -> None:
    """The sizes that a rehearsal is about stay those of the profile."""
    shown = {key for section in SMALL.values() for key in section}
    assert not shown & {"layer", "n_features", "k", "n_meta_features", "batch_tokens", "weights"}
