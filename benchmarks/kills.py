"""A real training run, killed with SIGKILL at random moments until it ends: the same weights?

`make kills` trains arms of the profile `tiny` (real residuals) once in peace and once with at
least KILLS kills, and compares every weight, moment, counter and history of all arms by the bytes
of their final states. Exits 1 if anything differs.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from metasae_lib import Profile, Run
from metasae_lib.subject.activations import Residuals

KILLS = 24
MOMENTS = (4.0, 30.0)  # seconds after the start; the imports and compiling take about ten
OVERRIDES = (
    "{training.train_tokens: 1_600_000, training.checkpoint_every: 40, training.seeds: [0], "
    "training.arms: [solo, joint, control, jumprelu, ortsae, matryoshka, as-released], "
    "training.meta_posthoc: []}"
)


def start(runs: Path) -> subprocess.Popen[bytes]:
    """The run in a process of its own."""
    command = [sys.executable, "-m", "metasae_lib", "train", "tiny", "--overrides", OVERRIDES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--runs-dir", str(runs)], env=environment)


def reached(runs: Path) -> int:
    """The step of the most advanced checkpoint."""
    names = [path.name for path in runs.glob("artefacts/arm-state-*/*.safetensors")]
    return max(
        (int(found[0]) for name in names if (found := re.findall(r"-(\d+)\.", name))), default=0
    )


def final_states(runs: Path) -> dict[str, str]:
    """Hash of every tensor of every arm's last state; seconds are left out, they are no result."""
    hashes = {}
    for path in sorted(runs.glob("artefacts/arm-state-*/final-*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            if name == "progress":
                tensor = tensor[[0, 2]]
            if name == "history":
                tensor = tensor[:, :-1]
            hashes[f"{path.parent.name}/{path.name}/{name}"] = hashlib.sha256(
                tensor.contiguous().numpy().tobytes()
            ).hexdigest()
    return hashes


def main() -> int:
    """Print one line a kill, then the verdict."""
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        peaceful, killed = Path(folder, "peaceful"), Path(folder, "killed")
        for runs in (peaceful, killed):  # the text's residuals, which are another stage
            list(Residuals(Run.open(Profile.load("tiny"), runs), "train"))
        if start(peaceful).wait() != 0:
            return 1
        kills = 0
        while True:
            process = start(killed)
            # After KILLS kills it may end.
            delay = moments.uniform(*MOMENTS) if kills < KILLS else None
            try:
                if process.wait(delay) != 0:
                    return 1
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                print(f"kill {kills} after {delay:.1f} s, checkpoint {reached(killed)}", flush=True)
        one, other = final_states(peaceful), final_states(killed)
        differ = [name for name in one if one[name] != other.get(name)]
        same = len(one) - len(differ)
        print(*(f"differs: {name}" for name in differ), sep="\n", end="\n" if differ else "")
        print(f"{kills} kills (seed {seed}): {same} of {len(one)} tensors equal to the bit")
        return 0 if one.keys() == other.keys() and same == len(one) and kills >= KILLS else 1


if __name__ == "__main__":
    sys.exit(main())
