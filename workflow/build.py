"""Make the book of some profiles: python workflow/build.py smollm2-135m gemma-3-270m

With --output FOLDER the book is rendered there and not here. With --executor slurm or kubernetes
the notebooks are jobs of a cluster. Checks the profiles, sees to it that one build runs here at a
time, and lets Snakemake work, with the further arguments that stand in $EXECUTOR_ARGS.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cluster
from environment import clean
from metasae_lib import Profile
from metasae_lib.study.errors import MetaSAEError

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the book of some profiles.")
    parser.add_argument("profiles", nargs="*")
    parser.add_argument("--output", default=".", help="folder in which _build/html is made")
    parser.add_argument("--executor", choices=cluster.EXECUTORS, default="local")
    arguments = parser.parse_args()
    profiles, output = list(dict.fromkeys(arguments.profiles)), arguments.output
    executor = arguments.executor
    if not profiles:
        sys.exit('Name a profile: make book PROFILES="smollm2-135m"')
    if {"{", "}"} & set(output):
        sys.exit(f"--output is {output}, but Snakemake fills in what stands in braces: rename it")
    try:
        given = shlex.split(os.environ.get("EXECUTOR_ARGS", ""))
    except ValueError as error:
        sys.exit(f"EXECUTOR_ARGS cannot be read: {error}")
    if sentence := cluster.missing(executor, given):
        sys.exit(sentence)
    os.chdir(REPOSITORY)
    try:
        for name in profiles:
            Profile.load(name)
            if not Path("profiles", f"{name}.yml").is_file():
                sys.exit(f"{name} names no file of profiles/: put it there, and give its bare name")
    except MetaSAEError as error:
        sys.exit(str(error))
    Path("_build").mkdir(exist_ok=True)
    environment = clean(os.environ, Path("_build/settings"))
    with open("_build/.lock", "a+") as lock:
        _wait_for(lock.fileno())
        try:
            # Snakemake holds the lock too: should this process be killed, it works on alone.
            done = subprocess.run(
                [*command(profiles, output, executor, environment), *given],
                pass_fds=[lock.fileno()], check=False, env=environment,
            )  # fmt: skip
        except KeyboardInterrupt:
            return 130
    if done.returncode:
        print("\nThe book is not finished; the reason stands above.", file=sys.stderr)
        return done.returncode
    index = Path(output, "_build/html/index.html")
    if not index.is_file():
        print(f"\nNo book was made: {index} is missing.", file=sys.stderr)
        return 1
    print(f"The book is ready: {index}")
    return 0


def command(
    profiles: Sequence[str],
    output: str,
    executor: str = "local",
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """What makes the book of some profiles in the folder `output`, run in the repository."""
    where = ["--cores", "all"]  # of this machine
    if executor != "local":
        where = cluster.arguments(executor, environment)
    return [
        sys.executable, *cluster.program(executor), "--snakefile", "workflow/Snakefile",
        *where, "--keep-going", "--nolock", "--rerun-incomplete",
        "--quiet", "progress", "rules", "host", "reason",  # "all" would keep its errors too
        "--profile", "none", "--workflow-profile", "none",  # the user's are for other work
        # As lists: of a bare value Snakemake makes a number where it can.
        "--config", f"profiles={json.dumps(profiles)}", f"output={json.dumps([output])}",
        f"executor={executor}",
    ]  # fmt: skip


def _wait_for(lock: int) -> None:
    """Hold a lock that the system drops when its holders die.

    Snakemake's own lock stays behind after a kill and asks the reader to unlock by hand, so it is
    switched off (--nolock); what a killed job left half done it makes again (--rerun-incomplete).
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another make book still works in this folder: waiting for its end.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


if __name__ == "__main__":
    sys.exit(main())
