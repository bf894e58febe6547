"""Make the book of some profiles: python workflow/build.py smollm2-135m gemma-3-270m

With --output FOLDER the book is rendered there and not here. Checks the profiles, sees to it that
one build runs here at a time, and lets Snakemake work.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from pathlib import Path

from metasae_lib import Profile
from metasae_lib.study.errors import MetaSAEError

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the book of some profiles.")
    parser.add_argument("profiles", nargs="*")
    parser.add_argument("--output", default=".", help="folder in which _build/html is made")
    arguments = parser.parse_args()
    profiles = list(dict.fromkeys(arguments.profiles))
    if not profiles:
        sys.exit('Name a profile: make book PROFILES="smollm2-135m"')
    os.chdir(REPOSITORY)
    try:
        for name in profiles:
            Profile.load(name)
    except MetaSAEError as error:
        sys.exit(str(error))
    Path("_build").mkdir(exist_ok=True)
    with open("_build/.lock", "a+") as lock:
        _wait_for(lock.fileno())
        command = [
            sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile",
            "--cores", "all", "--keep-going", "--nolock", "--rerun-incomplete", "--quiet", "all",
            "--config", f"profiles={' '.join(profiles)}", f"output={arguments.output}",
        ]  # fmt: skip
        try:
            # Snakemake holds the lock too: should this process be killed, it works on alone.
            done = subprocess.run(command, pass_fds=[lock.fileno()], check=False)
        except KeyboardInterrupt:
            return 130
    if done.returncode:
        print("\nThe book is not finished; the reason stands above.", file=sys.stderr)
        return done.returncode
    print(f"The book is ready: {Path(arguments.output, '_build/html/index.html')}")
    return 0


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
