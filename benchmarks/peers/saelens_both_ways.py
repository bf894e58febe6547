"""SAELens' side of benchmarks/saelens_roundtrip.py, in the peers' environment.

Argument: a folder with inputs.safetensors (x: residuals), exported/<arm>, and load.py, the lines of
the book's page that load one. Writes the outputs of every exported dictionary beside it, and into
made/<name> dictionaries of SAELens' own, trained on x for some steps, with theirs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from safetensors.torch import load_file, save_file
from torch import Tensor

STEPS, BATCH, WIDTH = 200, 512, 256
JUMP = JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 8}),
    "matryoshka-raw": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 8, "matryoshka_widths": [64, WIDTH]},
    ),
    "jumprelu-raw": (*JUMP, {"decoder_init_norm": None, "apply_b_dec_to_input": False}),
    "jumprelu-layer_norm": (*JUMP, {"normalize_activations": "layer_norm"}),
    "standard-rescaled": (
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        {"normalize_activations": "constant_norm_rescale"},
    ),
}


def train(sae: TrainingSAE[Any], x: Tensor) -> None:
    """A few steps, so that every weight and threshold has moved."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    found = sae.get_coefficients()
    weights = {name: float(getattr(each, "value", each)) for name, each in found.items()}
    for step in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        out = sae.training_forward_pass(TrainStepInput(x[rows], weights, None, step, False))
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()


@torch.no_grad()
def save_outputs(folder: Path, x: Tensor, acts: Tensor, x_hat: Tensor) -> None:
    """Activations and reconstructions, and explained variance as SAELens has defined it."""
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(x_hat, x)
    square, error = x.double().square(), (x - x_hat).double().square().sum(1)
    centred = (x - x.mean(0)).double().square().sum(1)
    defined = {
        "since 6.45": calculator.compute(),
        "before": 1 - float(error.mean() / (square.sum(1).mean() - square.mean() ** 2)),
        "legacy": float((1 - error / centred).mean()),
    }
    (folder / "explained.json").write_text(json.dumps(defined))
    save_file({"acts": acts.detach(), "x_hat": x_hat.detach()}, folder / "outputs.safetensors")


def main() -> None:
    os.chdir(sys.argv[1])
    x = load_file("inputs.safetensors")["x"]
    lines = Path("load.py").read_text()
    for folder in sorted(Path("exported").iterdir()):
        names: dict[str, Any] = {"x": x}
        exec(lines.replace("solo-seed0", folder.name), names)
        save_outputs(folder, x, names["acts"], names["x_hat"])
    for name, (kind, config, settings) in MADE.items():
        torch.manual_seed(0)
        sae = kind(config(d_in=x.shape[1], d_sae=WIDTH, **settings))
        train(sae, x)
        folder = Path("made") / name
        sae.save_inference_model(folder)
        loaded = SAE.load_from_disk(folder)
        acts = loaded.encode(x)
        save_outputs(folder, x, acts, loaded.decode(acts))
        if name == "batchtopk":  # as it is kept while it trains: it chooses over the batch
            folder = Path("made") / f"{name}-in-training"
            sae.save_model(folder)
            acts = sae.encode(x)
            save_outputs(folder, x, acts, sae.decode(acts))


if __name__ == "__main__":
    main()
