"""Every calibrated dictionary of a real run, exported, loaded in SAELens itself, compared.

    make roundtrip     (profile tiny; SAELens in an environment of its own, `make peers`)

SAELens normalises the raw residuals itself; its activations and reconstructions must agree with
ours to float tolerance; so must those of an arm whose start was folded back into its weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from metasae_lib import Profile, Run
from metasae_lib.measure.thresholds import calibrate_arms
from metasae_lib.subject.activations import Residuals
from metasae_lib.train.dictionary import denormalise, normalise
from metasae_lib.train.training import train_arms

ROOT = Path(__file__).resolve().parents[1]
IN_PEER = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder = sys.argv[1]
sae = SAE.load_from_disk(folder)
x = load_file(folder + "/inputs.safetensors")["x"]
acts = sae.encode(x)
out = sae.decode(acts)
save_file({"acts": acts.detach(), "out": out.detach()}, folder + "/peer.safetensors")
print(type(sae).__name__, sae.cfg.metadata.hook_name)
"""


def main() -> None:
    peers = os.environ.get("METASAE_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))
    if not Path(peers).exists():
        sys.exit("The peers' environment is missing: make peers")
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    folded = {"training.start": "standard", "training.arms": ["solo"], "training.seeds": [0]}
    worst = max(_compared(peers, Profile.load(name, changes)) for changes in ({}, folded))
    if not worst < 1e-4:
        sys.exit("SAELens and ours disagree")


def _compared(peers: str, profile: Profile) -> float:
    """The largest disagreement over the arms of a profile."""
    run = Run.open(profile, os.environ.get("METASAE_RUNS", "runs"))
    arms = train_arms(run)
    calibrate_arms(run, arms)
    x = Residuals(run, "calibration").chunk(0)[:2000].float().cpu()
    worst = 0.0
    for name, arm in arms.items():
        sae = arm.sae.cpu()
        with tempfile.TemporaryDirectory() as folder:
            sae.save(folder, {"hook_name": f"blocks.{profile.model.layer}.hook_resid_pre"})
            save_file({"x": x}, Path(folder) / "inputs.safetensors")
            done = subprocess.run(
                [peers, "-c", IN_PEER, folder], check=True, capture_output=True, text=True
            )
            theirs = load_file(Path(folder) / "peer.safetensors")
        z, mean, std = normalise(x)
        acts = sae.encode_threshold(z)
        out = denormalise(sae.decode(acts), mean, std)
        # A pre-activation within rounding of its threshold may fall on either side.
        differ = (theirs["acts"] - acts).abs() > 1e-4 * acts.abs().clamp(min=1)
        error = ((theirs["out"] - out).norm() / out.norm()).item()
        share = differ.sum().item() / max((acts > 0).sum().item(), 1)
        print(f"{name}: {done.stdout.strip()}; activations that differ {share:.1e}, "
              f"relative difference of reconstructions {error:.1e}")  # fmt: skip
        worst = max(worst, share, error)
    return worst


if __name__ == "__main__":
    main()
