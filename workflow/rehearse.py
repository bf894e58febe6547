"""A large profile at its own shapes, without its weights: python workflow/rehearse.py gpt2-large

A language model of the profile's shape with random weights is made on the spot; the dictionary, the
batch and the layer are the profile's; the text is the embedded one, and little of it. All seven
notebooks run, and the book of it is made. Its numbers mean nothing: what breaks, how long each
stage takes and how much memory it needs is what is asked. `--layers` cuts the language model
where memory ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from metasae_lib import Profile
from metasae_lib.study.errors import MetaSAEError
from metasae_lib.subject import embedded

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "_build" / "rehearsal"
TOKENIZER = "embedded:smollm2-135m"  # 49,152 ids: fewer than either vocabulary
SMALL: dict[str, dict[str, Any]] = {
    "text": {
        "source": "embedded", "column": "text", "max_share": {},
        "roles": {"train": 20_000, "calibration": 8_000, "scan": 20_000, "contexts": 16_000},
    },
    "training": {
        "train_tokens": 40_960, "arms": ["solo", "joint"], "seeds": [0], "lambda2": [0.3],
        "sigma_sq": [1.0], "selected": [0.3, 1.0], "frontier": [], "meta_posthoc": [],
    },
    "evaluation": {"ce_rows": 8, "bootstrap": 20},
    "autointerp": {
        "judge": "embedding", "explainer": "lexical", "model": "embedded:all-minilm-l6-v2",
        "features": 500, "window": 16, "explain_examples": 10, "score_examples": 5,
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="A large profile with random weights.")
    parser.add_argument("profile", choices=["gpt2-large", "gemma-2-9b"])
    parser.add_argument("--layers", type=int, help="blocks of the language model, if fewer")
    arguments = parser.parse_args()
    try:
        source = Profile.load(arguments.profile).model_dump()
        name = f"{arguments.profile}-rehearsal"
        model = save_random(arguments.profile, arguments.layers)
        values = {
            key: value | SMALL.get(key, {}) if isinstance(value, dict) else value
            for key, value in source.items()
        }
        layer = source["model"]["layer"]
        if arguments.layers:
            layer = min(layer, arguments.layers - 1)
        about = f"A rehearsal of {arguments.profile}: random weights, its numbers mean nothing."
        values |= {"name": name, "about": about}
        values["model"] |= {"source": f"folder:{model}", "layer": layer, "batch_rows": 16}
        path = REPOSITORY / "profiles" / f"{name}.yml"  # git ignores it
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        Profile.load(name)
    except MetaSAEError as error:
        sys.exit(str(error))
    build = [sys.executable, str(REPOSITORY / "workflow" / "build.py"), name]
    return subprocess.run([*build, "--output", str(FOLDER)], check=False).returncode


def config_of(name: str, layers: int | None = None) -> Any:
    """The configuration of a profile's language model, which no download is needed for."""
    from transformers import Gemma2Config, GPT2Config

    if name == "gpt2-large":
        return GPT2Config(n_embd=1280, n_layer=layers or 36, n_head=20)
    return Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=layers or 42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, vocab_size=256_000,
        query_pre_attn_scalar=256,
    )  # fmt: skip


def save_random(name: str, layers: int | None) -> Path:
    """A model of the profile's shape with random weights in bfloat16, and a tokenizer that fits.

    Made once for each number of layers; one that was killed while it was made is made anew.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = FOLDER / f"{name}-{layers or 'all'}-layers"
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as working:
        made = Path(working) / folder.name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name, layers), dtype=torch.bfloat16)
        model.save_pretrained(made, max_shard_size="1GB")
        for path in Path(embedded.snapshot(TOKENIZER)).glob("tokenizer*"):
            shutil.copy(path, made)
        os.replace(made, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
