"""Dictionaries of a real run in SAELens itself, and SAELens' own in ours, compared.

    make roundtrip     (profile tiny; SAELens in an environment of its own, `make peers`)

Ours are calibrated, exported, and loaded there by the lines that the book's page prints; an arm
whose start was folded back into its weights is among them. SAELens' are trained there for some
steps and brought by `training.given`. Either way SAELens reads the raw residuals; activations and
reconstructions must agree to float tolerance. The page shows the table, kept as book/saelens.csv.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lib import Profile, Run
from metasae_lib.measure import export_arms
from metasae_lib.measure.fidelity import Moments, Reconstruction, replacement
from metasae_lib.measure.passes import Entered
from metasae_lib.subject import Residuals
from metasae_lib.train import Dictionary, train_arms
from metasae_lib.train.given import check_given, load_given

ROOT = Path(__file__).resolve().parents[1]
N_TOKENS = 2000
# Of ours, those that the page shows: a kind each, and the one that was folded.
SHOWN = ["solo-seed0", "joint-lambda0.3-sigma1-seed0", "jumprelu-seed0", "solo-seed2"]


def main() -> None:
    peers = os.environ.get("METASAE_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))
    if not Path(peers).exists():
        sys.exit("The peers' environment is missing: make peers")
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    runs_dir = os.environ.get("METASAE_RUNS", "runs")
    page = (ROOT / "book" / "saelens.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder, ours = Path(temporary), dict[str, Dictionary]()
        folded = {"training.start": "standard", "training.arms": ["solo"], "training.seeds": [2]}
        for changes in ({}, folded):
            run = Run.open(Profile.load(name, changes), runs_dir)
            arms = train_arms(run)
            export_arms(run, arms, folder / "exported")
            ours |= {arm: trained.sae.cpu() for arm, trained in arms.items()}
        x = Residuals(run, "calibration").chunk(0)[:N_TOKENS].float().cpu()
        save_file({"x": x}, folder / "inputs.safetensors")
        (folder / "load.py").write_text(lines_that_load(page))
        worker = ROOT / "benchmarks" / "peers" / "saelens_both_ways.py"
        subprocess.run([peers, str(worker), str(folder)], check=True)
        made = {path.name: str(path) for path in sorted((folder / "made").iterdir())}
        given = Run.open(Profile.load(name, {"training.given": made}), folder / "runs")
        check_given(given)
        theirs = {arm: load_given(given.profile, arm) for arm in made}
        rows = [
            {"dictionary": arm, "by": who} | compared(sae, x, folder / where / arm)
            for who, where, saes in (("us", "exported", ours), ("SAELens", "made", theirs))
            for arm, sae in saes.items()
        ]
    table = pd.DataFrame(rows)
    print(table.to_string())
    worst = table[["acts differ", "output differs"]].to_numpy().max()
    if not worst < 1e-4:
        sys.exit("SAELens and ours disagree")
    shown = table[table.dictionary.isin(SHOWN) | (table["by"] == "SAELens")]
    shown.to_csv(ROOT / "book" / "saelens.csv", index=False, float_format="%.3g")


def lines_that_load(page: str) -> str:
    """The Python block of the page that loads a dictionary in SAELens."""
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    return next(block for block in blocks if "import SAE" in block)


def compared(sae: Dictionary, x: Tensor, folder: Path) -> dict[str, Any]:
    """Our activations and reconstructions of residuals x (t, d), against what SAELens left."""
    theirs = load_file(folder / "outputs.safetensors")
    tokens, mode = Entered(x), "batch" if sae.threshold is None else "threshold"
    u = tokens.of(sae)
    acts = sae.encode(u) if mode == "batch" else sae.encode_threshold(u)
    x_hat = replacement(sae, mode)(x[None])[0]
    # Of ours decoder rows have length 1. What lies within rounding of its threshold may differ.
    length = load_file(folder / "sae_weights.safetensors")["W_dec"].norm(dim=1)
    scale = torch.ones(1) if folder.parent.name == "exported" else length
    expected = theirs["acts"] * scale if mode == "threshold" else theirs["acts"]
    differ = (expected - acts).abs() > 1e-4 * acts.abs().clamp(min=float(acts[acts > 0].mean()))
    same = ~differ.any(1)  # such a one adds to its token what the other side leaves out
    off = theirs["x_hat"][same] - x_hat[same]
    sums = Reconstruction(Moments(x.shape[1]))
    sums.moments.add(tokens.z)
    sums.add(u, sae.decode(acts), int((acts > 0).sum()), tokens.unit(sae))
    explained = json.loads((folder / "explained.json").read_text())
    return {
        "acts differ": int(differ.sum()) / int((acts > 0).sum()),
        "output differs": float(off.norm() / x_hat[same].norm()),
        "L0": sums.l0,
        **{f"EV {when}": value for when, value in explained.items()},
        "1 - FVU here": 1 - sums.fvu,
    }


if __name__ == "__main__":
    main()
