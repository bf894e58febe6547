"""One training step of ours beside those of the peers, interleaved, on this machine.

    make bench BENCH=step            d 576, n 4096, k 32, batch 2048
    python benchmarks/step.py large  d 1280, n 20480, k 64, batch 4096

A step is forward, BatchTopK, AuxK on n/20 dead features, gradients, Adam, unit rows. Every library
runs in a process of its own and takes its turn, so that a busy machine slows all alike. The peers'
environment is `.venv-peers` (`make peers`) or the interpreter that $METASAE_PEERS names; without it
ours is measured against dense autograd alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"small": (576, 4096, 32, 2048, 11), "large": (1280, 20480, 64, 4096, 3)}
WARM_UP = 2
JOINT_PERIOD = 10  # a meta phase follows every tenth primary step: average over whole periods


class Worker:
    """A process that does one step for each line it is sent."""

    def __init__(self, python: str, name: str, dtype: str, *sizes: int) -> None:
        self.name, self.dtype = name, dtype
        self.seconds: list[float] = []
        worker = ROOT / "benchmarks" / "peers" / "worker.py"
        self.process = subprocess.Popen(
            [python, str(worker), name, dtype, *map(str, sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it has imported its library and made its data."""
        while self._read() != "ready":
            pass

    def step(self) -> float:
        self._ask()
        return float(self._read())

    def parts(self) -> dict[str, float]:
        """Seconds of each part of a step, and of the whole."""
        self._ask()
        return {**json.loads(self._read()), "step": float(self._read())}

    def peak(self) -> float:
        """Largest resident memory so far, in GiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ({self.dtype}) stopped with an error, see above")
        return line.strip()


def main() -> None:
    size = sys.argv[1] if len(sys.argv) > 1 else "small"
    d, n, k, b, rounds = SIZES[size]
    dead = n // 20
    peers = os.environ.get("METASAE_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))
    entries = [(sys.executable, name) for name in ("ours", "dense autograd", "encoder product")]
    if Path(peers).exists():
        entries += [(peers, name) for name in ("dictionary_learning", "SAELens", "sparsify")]
    else:
        print("The peers are not installed (make peers): dense autograd alone stands for them.")
    workers = [
        Worker(python, name, dtype, d, n, k, b, dead)
        for python, name in entries
        for dtype in ("bfloat16", "float32")
    ]
    joint = Worker(sys.executable, "ours, joint", "bfloat16", d, n, k, b, dead)
    for worker in [*workers, joint]:
        worker.wait()
    for turn in range(WARM_UP + rounds):
        for worker in workers:
            seconds = worker.step()
            if turn >= WARM_UP:
                worker.seconds.append(seconds)
    solo = workers[0]
    pairs = []
    for _ in range(JOINT_PERIOD):  # the first period warms up
        joint.step()
    for _ in range(2 if size == "small" else 1):
        turns = [(solo.step(), joint.step()) for _ in range(JOINT_PERIOD)]
        pairs.append(sum(j for _, j in turns) / sum(s for s, _ in turns))
    parts = Worker(sys.executable, "ours, parts", "bfloat16", d, n, k, b, dead)
    parts.wait()
    taken = [parts.parts() for _ in range(WARM_UP + rounds)][WARM_UP:]
    peaks = {worker: worker.peak() for worker in workers}
    for worker in [*workers, joint, parts]:
        worker.close()

    medians = {(w.name, w.dtype): statistics.median(w.seconds) for w in workers}
    mine = min(t for (name, _), t in medians.items() if name == "ours")
    floor = medians["encoder product", "bfloat16"]
    print(f"d {d}, n {n}, k {k}, batch {b}, {dead} dead features; median of {rounds} steps")
    print(f"{'':22}{'products':>10}{'ms':>9}{'range':>16}{'ours is':>9}{'peak GiB':>10}")
    for worker in workers:
        t = medians[worker.name, worker.dtype]
        spread = f"{min(worker.seconds) * 1e3:.0f} to {max(worker.seconds) * 1e3:.0f}"
        print(f"{worker.name:22}{worker.dtype:>10}{t * 1e3:9.1f}{spread:>16}{t / mine:8.2f}x"
              f"{peaks[worker]:10.2f}")  # fmt: skip
    print(f"over the floor (the encoder's product): {mine / floor:.2f}x")
    print("where a step of ours goes, bfloat16, ms (row_topk is a part of AuxK):")
    for part in sorted(taken[0], key=lambda part: -taken[0][part]):
        print(f"  {part:32}{statistics.median(t[part] for t in taken) * 1e3:9.1f}")
    print(f"joint arm over solo arm, meta phases included: {statistics.median(pairs):.3f}")
    others = [t for (name, _), t in medians.items() if name not in ("ours", "encoder product")]
    print(f"ratio: {min(others) / mine:.2f}")


if __name__ == "__main__":
    main()
