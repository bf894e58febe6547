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
from peers.worker import DEVICE, batches, ours, product, synchronise
from torch import Tensor

from metasae_lib.study.machine import made_with

FOLDER = Path(__file__).resolve().parents[1] / "book" / "scale"
# d, n, k, batch: the reference run, the size of published H100 figures, the paper's GPT-2 large
SIZES = [(576, 4096, 32, 1024), (768, 4096, 25, 1024), (1280, 20480, 64, 4096)]
WARM_UP, STEPS, ROUNDS = 30, 40, 5  # steps are recorded when their kernels have been compiled


def main() -> None:
    if DEVICE.type == "cpu":
        sys.exit("PyTorch finds no GPU here: make bench BENCH=step measures steps on a CPU")
    table = pd.DataFrame([row for size in SIZES for row in measured(*size)]).round(3)
    table.to_csv(FOLDER / "gpu.csv", index=False)
    print(table.to_string())
    made = made_with()
    (FOLDER / "gpu.txt").write_text(
        f"Measured on {made['date'][:10]} at commit {made['commit'][:12]} on one "
        f"{torch.cuda.get_device_name()}, with PyTorch {torch.__version__}.\n"
    )


def measured(d: int, n: int, k: int, b: int) -> list[dict[str, Any]]:
    """A row for each kind of arm, with a twentieth of its features dead and with none."""
    data, found = batches(d, b), []
    floor = milliseconds(product(torch.bfloat16, d, n, k, b, 0), data)
    for dead in (n // 20, 0):
        for arm in ("solo", "joint"):
            step = ours(torch.bfloat16, d, n, k, b, dead, arm == "joint")
            found.append(
                {"d": d, "n": n, "k": k, "batch": b, "arm": arm, "dead features": dead,
                 "ms": milliseconds(step, data), "encoder product (ms)": floor}
            )  # fmt: skip
    return found


def milliseconds(step: Callable[[Tensor], object], data: list[Tensor]) -> float:
    """Of one step among many; the median of some rounds."""
    for i in range(WARM_UP):
        step(data[i % 4])
    times = []
    for _ in range(ROUNDS):
        synchronise()
        started = time.perf_counter()
        for i in range(STEPS):
            step(data[i % 4])
        synchronise()
        times.append((time.perf_counter() - started) / STEPS * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
