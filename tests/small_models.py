"""Snapshots of real architectures, small and random, and a text for them to read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from metasae_lib import Profile

VOCABULARY = 257  # every byte, and BOS
BOS = 256
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": BOS,
    "pad_token_id": BOS,
}


def save_model(architecture: str, folder: Path) -> Path:
    """A random model whose norms and biases are not trivial, with a byte tokenizer."""
    torch.manual_seed(0)
    model: Any
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    elif architecture == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=VOCABULARY,
            bos_token_id=BOS, eos_token_id=BOS,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif architecture == "gemma2":
        # Soft caps this low change the logits of a random model by several per cent, and rows of 16
        # tokens reach beyond the window of every other block.
        caps = {
            "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 8, "sliding_window": 4,
        }  # fmt: skip
        model = Gemma2ForCausalLM(Gemma2Config(**_SIZES | caps))
    else:
        assert architecture == "gemma3"
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES | {"query_pre_attn_scalar": 8}))
    save_random(model, folder)
    return folder


def save_random(model: Any, folder: Path) -> None:
    """A model with norms and biases that are not trivial, and a byte tokenizer."""
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.1
        parameter.data += spread * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <bos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


def save_text(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """A jsonl file of distinct documents of 2 to 12 random words."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(50)]
    lines = [
        json.dumps({"text": " ".join([f"{i}:", *rng.choices(words, k=rng.randint(2, 12))])})
        for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def small_profile(model: Path, text: Path, **changes: Any) -> Profile:
    """The profile `tiny`, on a small model and a local text; changes by dotted key, `.` as `__`."""
    overrides: dict[str, Any] = {
        "model.source": f"folder:{model}",
        "model.layer": 2,
        "model.dtype": "float32",
        "model.batch_rows": 4,
        "text.source": f"files:{text}",
        "text.max_share": {},
        "text.context_length": 16,
        "text.roles": {"train": 600, "calibration": 60, "scan": 240, "contexts": 90},
        "activations.chunk_rows": 7,
        "training.batch_tokens": 64,
        "training.train_tokens": 640,
        "evaluation.ce_rows": 4,
        "device": "cpu",
    }
    return Profile.load("tiny", overrides | {k.replace("__", "."): v for k, v in changes.items()})
