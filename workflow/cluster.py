"""The workflow on a cluster: what its jobs ask for, and how Snakemake is started for it.

Snakemake's own executor plugins submit, watch and repeat the jobs; nothing here does. What all jobs
share is the repository's folder: the library keeps its results under runs/ and locks them there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from metasae_lib import Profile
from metasae_lib.study.plan import arms_at_once, machines, sizes, stage_seconds

REPOSITORY = Path(__file__).resolve().parents[1]
EXECUTORS = ("local", "slurm", "kubernetes")
CORES = 4  # of a job
#: The notebook that trains, and those that read the language model or the dictionaries besides.
TRAINING = "02_training"
HEAVY = {TRAINING, "03_cooccurrence", "04_autointerp", "05_case_studies"}
# Plans count the large products alone, so twice as much is asked for. The floors are for all that
# is small, and for judges. More than a day is given by few clusters, and needed by no job: one that
# ran out of time is submitted again and goes on from its checkpoint.
FACTOR = 2
LEAST_MB, LEAST_MINUTES, MOST_MINUTES = 8_000, 240, 24 * 60
#: Where no plan can be made, as the model's shape is not known before its download.
UNKNOWN_MB = 64_000
#: The slowest GPU that plans know.
GPU = "a100"


def asked(profile: Profile, notebook: str) -> dict[str, int | None]:
    """What the job of a notebook asks for: memory of the host, minutes, GPUs (None for none)."""
    if notebook not in HEAVY:
        return {"mem_mb": LEAST_MB, "runtime": LEAST_MINUTES, "gpu": None}
    gpu = profile.device != "cpu"
    memory, minutes = _planned(profile, gpu)
    return {
        "mem_mb": max(LEAST_MB, memory),
        "runtime": min(MOST_MINUTES, max(LEAST_MINUTES, minutes)),
        "gpu": 1 if gpu else None,
    }


def _planned(profile: Profile, gpu: bool) -> tuple[int, int]:
    """Megabytes and minutes of the profile's plan, times the factor."""
    shape, arms = profile.shape, len(profile.arms())
    if shape is None:
        return UNKNOWN_MB, MOST_MINUTES
    machine, size = machines()[GPU if gpu else "cpu"], sizes(profile, shape, gpu)
    trained = max(1, arms_at_once(profile, shape, machine)[0])
    # Without a GPU all arms are in the host's memory; with one they pass through it one by one.
    largest = max(size["training"], size["counting"])
    passing = largest if gpu else largest * arms + size["step"]
    host = size["loading"] + size["model"] + passing
    seconds = sum(stage_seconds(profile, shape, machine.costs(profile, shape), trained).values())
    return math.ceil(FACTOR * host / 1e6), math.ceil(FACTOR * seconds / 60)


def resources(executor: str) -> dict[str, Any]:
    """What the Snakefile's rules ask for: values, or functions of their wildcards."""

    def of(resource: str) -> Callable[..., int | None]:
        return lambda wildcards: asked(
            _profile(wildcards.profile), getattr(wildcards, "notebook", TRAINING)
        )[resource]

    found: dict[str, Any] = {name: of(name) for name in ("mem_mb", "runtime", "gpu")}
    if executor == "kubernetes":
        # It gives GPUs to pods with limits only, which they have at scale 0. The disk is for what
        # is not on the volume.
        found |= {"gpu_manufacturer": "nvidia", "scale": 0, "disk_mb": LEAST_MB}
    return found


@cache
def _profile(name: str) -> Profile:
    return Profile.load(REPOSITORY / "profiles" / f"{name}.yml")


def program(executor: str) -> list[str]:
    """How Python starts Snakemake: as it is, or by way of `main` below."""
    return [os.fspath(Path(__file__))] if executor == "kubernetes" else ["-m", "snakemake"]


def arguments(executor: str, environment: Mapping[str, str]) -> list[str]:
    """Snakemake's arguments for an executor that is not local. environment: of the build."""
    given = ["--executor", executor, "--jobs", "unlimited", "--retries", "2"]
    given += ["--latency-wait", "60"]  # seconds until a shared disk shows another machine's file
    if executor == "slurm":
        return [*given, "--slurm-logdir", "_build/slurm"]
    # A container knows neither the folder nor what was set here: for the build, or by the user.
    ours = ("METASAE_", "HF_")
    passed = [
        name
        for name, value in environment.items()
        if name.startswith(ours) or os.environ.get(name) != value
    ]
    return [*given, "--precommand", f"cd {shlex.quote(str(REPOSITORY))}", "--envvars", *passed]


def missing(executor: str, given: Sequence[str]) -> str | None:
    """What keeps an executor from being used here, as a sentence. given: the user's arguments."""
    if executor == "local":
        return None
    if importlib.util.find_spec(f"snakemake_executor_plugin_{executor}") is None:
        python = os.path.relpath(sys.executable, REPOSITORY)
        return (
            f"EXECUTOR={executor} needs a plugin of Snakemake: {python} -m pip install"
            " --constraint requirements.lock --editable '.[cluster]'"
        )
    if executor == "slurm" and not shutil.which("sbatch"):
        return "EXECUTOR=slurm needs a machine that may submit jobs, and here is no sbatch"
    options = {argument.partition("=")[0] for argument in given}
    for option in ("--container-image", "--kubernetes-persistent-volumes"):
        if executor == "kubernetes" and option not in options:
            return f"EXECUTOR=kubernetes needs {option} in EXECUTOR_ARGS: see book/cluster.md"
    return None


def main() -> None:
    """Snakemake, with jobs on Kubernetes that share a volume.

    The plugin mounts volumes, but takes it for granted that files are copied through a store
    instead, whatever --shared-fs-usage says.
    """
    plugin = importlib.import_module("snakemake_executor_plugin_kubernetes")
    plugin.common_settings.implies_no_shared_fs = False
    plugin.common_settings.job_deploy_sources = False
    runpy.run_module("snakemake", run_name="__main__")


if __name__ == "__main__":
    main()
