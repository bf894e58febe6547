"""How time and memory of each stage grow with features, arms and tokens, against their order.

    make bench BENCH=scale

Untrained dictionaries on residuals of SmolLM2-135M (d 576) and words at random, k 32, batches of
2,048. Every point is a process of its own, on one thread: processor seconds are the least of two
calls, memory is what it grew by. The exponents of growth are fitted to the last three points of
each stage. What a page of the book shows of it is left in book/scale/. Ends with
`ratio: <the least of expected over measured exponent of time>`: below 1 something grows too fast.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd
import torch
from counts import firing
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from threadpoolctl import threadpool_limits

from metasae_lib import Profile, Run
from metasae_lib.interpret import collect_contexts
from metasae_lib.measure import (
    CooccurrenceCounter,
    CrossCounts,
    calibrate_arms,
    hungarian,
    summarise,
    top_matches,
)
from metasae_lib.measure.counting import Counts
from metasae_lib.measure.fidelity import reconstruct
from metasae_lib.measure.passes import GROUP, pre_activations, product_dtype, scan_chunks
from metasae_lib.measure.phi import abs_phi_blocks
from metasae_lib.measure.scan import ArmScan
from metasae_lib.measure.statistics import bootstrap_mean_abs, feature_draws
from metasae_lib.show.figures.style import BLACK, KINDS, styled
from metasae_lib.study import ArmSpec, Role
from metasae_lib.study.machine import made_with
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm, BatchTopK, normalise
from metasae_lib.train.replay import Workspace
from metasae_lib.train.trainer import Trainer
from metasae_lib.train.training import arm_bytes, step_bytes

FOLDER = Path(__file__).resolve().parents[1] / "book" / "scale"
D, K, BATCH, ROLE = 576, 32, 2048, 8192
ROLES: tuple[Role, ...] = ("train", "calibration", "scan", "contexts")
CALLS, FITTED = 2, 3


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement. tokens: of each role."""

    n: int = 4096
    arms: int = 1
    tokens: int = ROLE

    def profile(self, runs_dir: str = "") -> Profile:
        n_meta = round(0.09 * self.n)  # the paper's share
        changes = {
            "device": "cpu",
            "model.layer": 1,
            "dictionary": {"n_features": self.n, "k": K, "n_meta_features": n_meta, "meta_k": 8},
            "training": {"batch_tokens": BATCH, "train_tokens": BATCH, "dead_after": 10**6},
        }
        if runs_dir:
            changes["text"] = {
                "source": f"files:{runs_dir}/{self.tokens}.txt",
                "max_share": {},
                "roles": dict.fromkeys(ROLES, self.tokens),
            }
        return Profile.load("tiny", changes)


Unit = Callable[[int], object]  # the number of the call -> what is timed


def steps(kind: str) -> Callable[[Point, str], Unit]:
    """Ten training steps of every arm, all from one batch, with the meta phase after them."""

    def prepare(point: Point, runs_dir: str) -> Unit:
        shared, profile = Workspace(), point.profile()
        specs = [ArmSpec(kind, seed, *((0.3, 1.0) if kind == "joint" else ()))
                 for seed in range(point.arms)]  # fmt: skip
        trainers = [Trainer(spec, profile, D, torch.device("cpu"), shared) for spec in specs]
        z = normalise(torch.randn(BATCH, D))[0]
        period = profile.training.n_primary_steps
        return lambda _: [trainer.step(z) for _ in range(period) for trainer in trainers]

    return prepare


def arms_of(point: Point, runs_dir: str, call: int) -> dict[str, Arm]:
    """Untrained arms with names of their own, so that nothing is found made."""
    made = {}
    for arm in range(point.arms):
        name = f"arm-{os.getpid()}-{call}-{arm}"
        sae = BatchTopK(D, point.n, K, seed=arm)
        made[name] = Arm(ArmSpec("solo", arm), sae, None, pd.DataFrame(), Path(runs_dir, name))
    return made


def thresholds(point: Point, runs_dir: str) -> Unit:
    run = Run.open(point.profile(runs_dir), runs_dir)
    arms = [arms_of(point, runs_dir, call) for call in range(CALLS)]
    return lambda call: calibrate_arms(run, arms[call])


def scan(point: Point, runs_dir: str) -> Unit:
    """Firing above the thresholds and the pairs of it, before counts go to disk."""
    run, arms = Run.open(point.profile(runs_dir), runs_dir), arms_of(point, runs_dir, 0)
    found, dtype, residuals = calibrate_arms(run, arms), product_dtype(run), Residuals(run, "scan")

    def unit(call: int) -> None:
        scans = [ArmScan(run, arm, found[name], run.artefact("counts", {"arm": name, "call": call}))
                 for name, arm in arms.items()]  # fmt: skip
        for _, parts in scan_chunks(residuals, "scan"):
            for tokens in parts:
                for one in scans:
                    one.add(pre_activations(one.sae, tokens.of(one.sae), dtype))
        for one in scans:
            one.counter.counts()

    return unit


def contexts(point: Point, runs_dir: str) -> Unit:
    run = Run.open(point.profile(runs_dir), runs_dir)
    arms = [arms_of(point, runs_dir, call) for call in range(CALLS)]
    for each in arms:
        calibrate_arms(run, each)
    return lambda call: collect_contexts(run, arms[call])


def fidelity(point: Point, runs_dir: str) -> Unit:
    run = Run.open(point.profile(runs_dir), runs_dir)
    sae, dtype = BatchTopK(D, point.n, K), product_dtype(run)
    x = torch.cat(list(Residuals(run, "scan")))[: 4 * BATCH].float()
    parts = normalise(x)[0].split(BATCH)
    return lambda _: [reconstruct(sae, z, "batch", dtype) for z in parts]


def counted(n: int) -> Counts:
    counter = CooccurrenceCounter(n)
    counter.update(firing(ROLE, n, K, np.random.default_rng(0)))
    return counter.counts()


def phi_summary(point: Point, runs_dir: str) -> Unit:
    counts = counted(point.n)
    return lambda _: summarise(counts)


def bootstrap(point: Point, runs_dir: str) -> Unit:
    counts = counted(point.n)
    draws = feature_draws(point.n)[counts.alive]
    return lambda _: bootstrap_mean_abs(abs_phi_blocks(counts), draws)


def partners(point: Point, runs_dir: str) -> Unit:
    counts = counted(point.n)
    cross = CrossCounts(counts.n11, counts.n1, counts.n1, counts.n_tokens)
    return lambda _: top_matches(cross)


def matching(point: Point, runs_dir: str) -> Unit:
    """Two dictionaries that half match."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, point.n, D, generator=generator)
    b[: point.n // 2] = a[: point.n // 2] + 0.5 * b[: point.n // 2]
    b = b[torch.randperm(point.n, generator=generator)]
    return lambda _: hungarian(a, b)


@dataclass(frozen=True)
class Stage:
    """A stage along one of the sizes: how a call is prepared, and what is expected of its cost.

    time, memory: up to a factor; order: of time, in words.
    """

    name: str
    along: str
    prepare: Callable[[Point, str], Unit]
    order: str
    time: Callable[[Point], float]
    memory: Callable[[Point], float]


def training_memory(kind: str) -> Callable[[Point], float]:
    """What the library itself plans with."""
    spec = ArmSpec(kind, 0, *((0.3, 1.0) if kind == "joint" else ()))
    return lambda p: p.arms * arm_bytes(p.profile(), D, spec) + step_bytes(p.profile(), D)


def group_memory(p: Point) -> float:
    return 4.0 * GROUP * p.n  # pre-activations


def counts_memory(p: Point) -> float:
    return 4.0 * p.arms * p.n**2 + group_memory(p)


def joint_work(p: Point) -> float:
    # Products with d and n: six of the batch a step; of the meta dictionary's two, and six in a
    # phase of five steps after every ten.
    return p.n * (6 * BATCH + 5 * 0.09 * p.n)


def product(p: Point) -> float:
    return float(p.n * p.arms * p.tokens)


def scanning(p: Point) -> float:
    # The counts are made and mirrored, each in about the time of d multiply-adds.
    return float(p.n * p.arms * (p.tokens + p.n))


def square(p: Point) -> float:
    return float(p.n**2)


VALUES = {
    "n": (1024, 2048, 4096, 10_240, 20_480),
    "arms": (1, 4, 8, 16, 32),
    "tokens": (ROLE, 3 * ROLE, 10 * ROLE),
}
NAMED = {"n": "features n", "arms": "arms", "tokens": "tokens"}
STAGES = [
    Stage("step, solo", "n", steps("solo"), "b n d", product, training_memory("solo")),
    Stage("step, joint", "n", steps("joint"), "b n d + n m d", joint_work,
          training_memory("joint")),
    Stage("thresholds", "n", thresholds, "t n d", product, group_memory),
    Stage("scan of pairs", "n", scan, "t n d + n² d", scanning, counts_memory),
    Stage("contexts", "n", contexts, "t n d", product, group_memory),
    Stage("fidelity", "n", fidelity, "t n d", product, group_memory),
    Stage("summary of φ", "n", phi_summary, "n²", square, square),
    Stage("bootstrap of φ", "n", bootstrap, "n²", square, square),
    Stage("partners", "n", partners, "n²", square, square),
    Stage("matching", "n", matching, "n³ at worst", lambda p: float(p.n**3), square),
    Stage("step, solo", "arms", steps("solo"), "arms", product, training_memory("solo")),
    Stage("step, joint", "arms", steps("joint"), "arms", product, training_memory("joint")),
    Stage("scan of pairs", "arms", scan, "arms", scanning, counts_memory),
    Stage("thresholds", "tokens", thresholds, "t n d", product, product),
    Stage("scan of pairs", "tokens", scan, "t n d + n² d", scanning, counts_memory),
    Stage("contexts", "tokens", contexts, "t n d", product, group_memory),
]  # fmt: skip


def resident(what: str) -> float:
    """GiB of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def measure(stage: Stage, point: Point, runs_dir: str, results: Any) -> None:
    """Send the least seconds of some calls, and the GiB that the process has grown by at most.

    Seconds are those of the processor on one thread, which hold on a busy machine too.
    """
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    threadpool_limits(1)
    before = resident("VmRSS")
    unit = stage.prepare(point, runs_dir)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most that preparing took
    seconds = []
    for call in range(CALLS):
        started = time.process_time()
        unit(call)
        seconds.append(time.process_time() - started)
    results.put((min(seconds), resident("VmHWM") - before))


def fill(point: Point, runs_dir: str, results: Any) -> None:
    """Have the residuals of every role on disk, of words at random."""
    generator = np.random.default_rng(0)
    letters = generator.choice(list("aeinorst"), size=(11 * point.tokens, 4))
    words = [f"{''.join(word)} " + "\n\n" * (i % 100 == 0) for i, word in enumerate(letters)]
    Path(runs_dir, f"{point.tokens}.txt").write_text("".join(words))
    run = Run.open(point.profile(runs_dir), runs_dir)
    for role in ROLES[1:]:
        Residuals(run, role).fill()
    results.put((0.0, 0.0))


def apart(work: Callable[..., None], *given: Any) -> tuple[float, float]:
    """What a process of its own sends. It is a fork: libraries are loaded once."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(*given, results))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"a measurement stopped with an error, see above: {given[:2]}")
    found: tuple[float, float] = results.get()
    return found


def measured() -> pd.DataFrame:
    """A row a point: stage, along, order, value, seconds, gib and what is expected of either."""
    rows = []
    with tempfile.TemporaryDirectory() as runs_dir:
        for tokens in VALUES["tokens"]:
            apart(fill, Point(tokens=tokens), runs_dir)
        for stage in STAGES:
            for value in VALUES[stage.along]:
                base = Point(n=2048) if stage.along == "arms" else Point()
                point = replace(base, **{stage.along: value})
                seconds, gib = apart(measure, stage, point, runs_dir)
                print(f"{stage.name:16}{stage.along:>8}{value:>9,}{seconds:10.3f} s{gib:9.2f} GiB",
                      flush=True)  # fmt: skip
                rows.append((stage.name, NAMED[stage.along], stage.order, value, seconds, gib,
                             stage.time(point), stage.memory(point)))  # fmt: skip
    columns = ["stage", "along", "work", "value", "seconds", "GiB", "time expected",
               "memory expected"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def exponent(points: pd.DataFrame, column: str) -> float:
    """Of the growth of a column with the value, over the last points."""
    last = points.tail(FITTED)
    return float(np.polyfit(np.log(last.value), np.log(last[column]), 1)[0])


def exponents(points: pd.DataFrame) -> pd.DataFrame:
    """A row a stage: the exponents of its growth, expected and measured, and its largest point."""
    rows = []
    for (along, stage), same in points.groupby(["along", "stage"], sort=False):
        found = {name: exponent(same, name)
                 for name in ("time expected", "seconds", "memory expected", "GiB")}  # fmt: skip
        last = same.iloc[-1]
        rows.append({
            "along": along, "stage": stage, "work": last["work"],
            "time, expected": found["time expected"], "time, measured": found["seconds"],
            "memory, expected": found["memory expected"], "memory, measured": found["GiB"],
            "at": f"{last.value:,}", "seconds": last.seconds, "GiB": last.GiB,
        })  # fmt: skip
    return pd.DataFrame(rows)


@styled(7.0, 6.2, nrows=2, ncols=3, sharex="col", sharey="row")
def drawn(axes: Any, points: pd.DataFrame) -> None:
    """Cost over expected work, relative to the largest size: flat where both grow alike."""
    looks = dict(zip(dict.fromkeys(points.stage), KINDS.values(), strict=False))
    for column, (along, same) in enumerate(points.groupby("along", sort=False)):
        for row, (cost, work) in enumerate((("seconds", "time expected"),
                                            ("GiB", "memory expected"))):  # fmt: skip
            ax: Axes = axes[row, column]
            for stage, part in same.groupby("stage", sort=False):
                relative = part[cost] / part[work]
                colour, marker = looks[stage]
                ax.plot(part.value, relative / relative.iloc[-1], color=colour, marker=marker,
                        label=stage)  # fmt: skip
            ax.axhline(1, color=BLACK, linewidth=0.8)
            ax.set_xscale("log")
            ax.set_yscale("log")
        ends = sorted(set(same.value))[::2]
        axes[1, column].set_xticks(ends, [f"{end:,}" for end in ends])
        axes[1, column].xaxis.set_minor_locator(NullLocator())
        axes[1, column].set_xlabel(along)
    for row, cost in enumerate(("time", "memory")):
        axes[row, 0].set_ylabel(
            f"{cost} over expected {'work' if row == 0 else 'bytes'}\n(1 at the largest size)"
        )
    handles = {}
    for ax in axes[0]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    axes[0, 0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def report(points: pd.DataFrame) -> None:
    """Print the exponents, and leave for the book's page what it shows."""
    table, made = exponents(points), made_with()
    print(table.to_string(float_format="%.2f"))
    FOLDER.mkdir(exist_ok=True)
    points.to_csv(FOLDER / "points.csv", index=False, float_format="%.4g")
    table.to_csv(FOLDER / "exponents.csv", index=False, float_format="%.2f")
    drawn(points).savefig(FOLDER / "growth.svg", metadata={"Date": None})
    hardware = made["hardware"]
    (FOLDER / "made.txt").write_text(
        f"Measured on {made['date'][:10]} at commit {made['commit'][:12]} with {hardware['cores']} "
        f"cores of {hardware['processor']} and {hardware['memory_gib']:.0f} GiB of memory.\n"
    )
    times = table["time, expected"] / table["time, measured"]
    worst = table.loc[times.idxmin()]
    print(f"the least of expected over measured exponents of time: {worst.stage}, {worst.along}")
    print(f"ratio: {times.min():.2f}")


if __name__ == "__main__":
    report(measured())
