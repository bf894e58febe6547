"""Architectures as small random models: what we read of them is what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import BOS, VOCABULARY, save_random, save_text, small_profile
from transformers import AutoConfig, AutoModelForCausalLM

from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.questions import JudgeError
from metasae_lib.study import SubjectError
from metasae_lib.subject import load_subject

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": BOS,
    "eos_token_id": BOS, "pad_token_id": BOS, "max_position_embeddings": 512,
}  # fmt: skip
_ALL_HEADS = _COMMON | {"num_key_value_heads": 4}
_EXPERTS = _COMMON | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_routed_experts": 4,
}  # fmt: skip
_GPT2 = {
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY,
    "bos_token_id": BOS, "eos_token_id": BOS,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "stablelm", "starcoder2", "olmo",
         "olmo2", "olmo3", "smollm3", "glm", "glm4", "ernie4_5", "exaone4", "seed_oss", "arcee",
         "nemotron", "apertus", "ministral3", "hunyuan_v1_dense"], _COMMON),
    **dict.fromkeys(["mixtral", "olmoe"], _EXPERTS),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "openai-gpt"], _GPT2),
    **dict.fromkeys(["gptj", "codegen"], _GPT2 | {"rotary_dim": 4}),
    **dict.fromkeys(["gpt_neox", "phi"], _ALL_HEADS),
    **dict.fromkeys(["cohere", "cohere2"], _COMMON | {"logit_scale": 0.0625}),
    "gemma2": _COMMON | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": _COMMON | {"query_pre_attn_scalar": 8},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 2]], "vocab_size": VOCABULARY,
        "bos_token_id": BOS, "eos_token_id": BOS,
    },
    "opt": _ALL_HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": BOS,
    },
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 512,
            "vocab_size": VOCABULARY},
    "xglm": {
        "d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4, "pad_token_id": 1,
        "max_position_embeddings": 512, "vocab_size": VOCABULARY,
    },
    "granite": _COMMON | {"logits_scaling": 8.0, "embedding_multiplier": 2.0,
                          "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granitemoe": _EXPERTS | {"logits_scaling": 8.0},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 1},
    "gpt_oss": _EXPERTS | {"sliding_window": 8},
    "helium": _COMMON,
}  # fmt: skip
#: Whose attention cannot be told which token sees which, in the form of one mask.
UNPACKED = {"openai-gpt", "bloom", "mpt", "gpt_oss"}
#: What TransformerLens has no form of.
UNKNOWN = {"helium"}
#: Whose weights TransformerLens folds into another model, and whose it cannot fold or centre.
FOLDED_WRONGLY = {"qwen2_moe", "gpt_oss"}
NOT_FOLDED = {
    "phi3", "olmo2", "olmo3", "glm", "glm4", "exaone4", "nemotron", "openai-gpt", "xglm"
}  # fmt: skip
LAYER = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def save(architecture: str, folder: Path) -> Any:
    """A random model whose norms and biases are not trivial, saved; returns it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    save_random(model, folder)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residuals_and_cross_entropy_are_transformers_own(
    architecture: str, text: Path, tmp_path: Path
) -> None:
    model = save(architecture, tmp_path / "model")
    ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, (5, 16), dtype=np.int32)
    given = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        made = model(given, output_hidden_states=True)
    logp = made.logits.double().log_softmax(-1)[:, :-1]
    expected = -logp.gather(-1, given[:, 1:, None])[..., 0]

    profile = small_profile(tmp_path / "model", text, model__layer=LAYER)
    if architecture in UNKNOWN:
        with pytest.raises(SubjectError, match="could not be loaded"):
            load_subject(profile)
        return
    subject = load_subject(profile)
    residuals = subject.residuals(ids)
    torch.testing.assert_close(residuals, made.hidden_states[LAYER], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(subject.loss(ids).double(), expected, rtol=0, atol=1e-5)

    processed = small_profile(
        tmp_path / "model", text, model__layer=LAYER, model__weights="processed"
    )
    if architecture in FOLDED_WRONGLY | NOT_FOLDED:
        with pytest.raises(SubjectError, match="to as_trained"):
            load_subject(processed)
    else:
        loss = load_subject(processed).loss(ids)
        torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_judges_log_probabilities_are_those_of_plain_rows(
    architecture: str, tmp_path: Path
) -> None:
    save(architecture, tmp_path)
    judge = InProcessJudge(f"folder:{tmp_path}", batch_tokens=200)
    judge.model.float()
    pairs = sorted((e, t) for e in ("red", "green") for t in ("a bc d", "a bc e", "zz"))
    if architecture in UNPACKED:
        with pytest.raises(JudgeError, match="cannot judge by log-probabilities"):
            judge._log_likelihoods(pairs)
        return
    found = judge._log_likelihoods(pairs)
    for explanation, text in pairs:
        prompt, ids = judge._prompt(explanation), judge._ids(text)
        row = torch.tensor([prompt + ids])
        with torch.no_grad():
            logp = judge.model(row, use_cache=False).logits[0].double().log_softmax(-1)
        alone = sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
        assert found[explanation, text] == pytest.approx(alone, abs=1e-4)
