"""Training steps on a GPU, one after the other without waiting, as a run makes them.

    make bench BENCH=gpu

Writes book/scale/gpu.csv, with which `make plan GPU=h200` counts. `make bench BENCH=step` waits
after every step, and stands beside the peers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metasae_lib import Profile
from metasae_lib.study import ArmSpec
from metasae_lib.study.machine import made_with
from metasae_lib.train.dictionary import normalise
from metasae_lib.train.trainer import Trainer

FOLDER = Path(__file__).resolve().parents[1] / "book" / "scale"
# d, n, k, batch: the reference run, the size of published H100 figures, the paper's GPT-2 large
SIZES = [(576, 4096, 32, 1024), (768, 4096, 25, 1024), (1280, 20480, 64, 4096)]
WARM_UP, STEPS, ROUNDS = 30, 40, 5  # steps are recorded when their kernels have been compiled


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here: make bench BENCH=step measures steps on a CPU")
    device = torch.device("cuda")
    rows = [row for size in SIZES for row in measured(size, device)]
    table = pd.DataFrame(rows).round(3)
    table.to_csv(FOLDER / "gpu.csv", index=False)
    print(table.to_string())
    made = made_with()
    (FOLDER / "gpu.txt").write_text(
        f"Measured on {made['date'][:10]} at commit {made['commit'][:12]} on one "
        f"{torch.cuda.get_device_name()}, with PyTorch {torch.__version__}.\n"
    )


def measured(size: tuple[int, int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """A row for each kind of arm, with a twentieth of its features dead and with none."""
    d, n, k, b = size
    made = torch.Generator().manual_seed(0)
    batches = [normalise(sparse_sums(b, d, made).to(device))[0] for _ in range(4)]
    low, rows = (torch.randn(m, d, generator=made).to(device, torch.bfloat16) for m in (b, n))
    product = milliseconds(lambda _: torch.mm(low, rows.T), batches)
    found = []
    for dead in (n // 20, 0):
        for arm in ("solo", "joint"):
            step = trainer(arm, size, dead, device).step
            found.append(
                {"d": d, "n": n, "k": k, "batch": b, "arm": arm, "dead features": dead,
                 "ms": milliseconds(step, batches), "encoder product (ms)": product}
            )  # fmt: skip
    return found


def sparse_sums(b: int, d: int, generator: torch.Generator) -> Tensor:
    """Sums of some 30 of 4 d directions, with noise: (b, d)."""
    directions = torch.randn(4 * d, d, generator=generator)
    weights = torch.rand(b, 4 * d, generator=generator)
    weights *= torch.rand(b, 4 * d, generator=generator) < 30 / (4 * d)
    return weights @ directions + torch.randn(b, d, generator=generator)


def trainer(arm: str, size: tuple[int, int, int, int], dead: int, device: torch.device) -> Trainer:
    """An arm, the first of its features too weak to be selected."""
    d, n, k, b = size
    sizes = {"n_features": n, "k": k, "n_meta_features": round(0.09 * n), "meta_k": 8}
    settings = {"batch_tokens": b, "dtype": "bfloat16", "k_aux": round(0.4 * d),
                "n_primary_steps": 10, "n_meta_steps": 5}  # fmt: skip
    profile = Profile.load("tiny", {"dictionary": sizes, "training": settings})
    spec = ArmSpec(arm, 0, *((0.3, 1.0) if arm == "joint" else ()))
    made = Trainer(spec, profile, d, device)
    made.primary.W_enc_T[:dead] *= 1e-3
    state = made.state()
    state["primary.silent"][:dead] = 1000
    made.restore(state)
    return made


def milliseconds(step: Callable[[Tensor], object], batches: list[Tensor]) -> float:
    """Of one step among many; the median of some rounds."""
    for i in range(WARM_UP):
        step(batches[i % 4])
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for i in range(STEPS):
            step(batches[i % 4])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / STEPS * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
