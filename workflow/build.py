"""Make the book of some profiles: python workflow/build.py smollm2-135m gemma-3-270m

Checks the profiles, sees to it that one build runs here at a time, and becomes Snakemake.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from metasae_lib import Profile
from metasae_lib.errors import MetaSAEError

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    profiles = list(dict.fromkeys(sys.argv[1:]))
    if not profiles:
        sys.exit('Name a profile: make book PROFILES="smollm2-135m"')
    try:
        for name in profiles:
            Profile.load(name)
    except MetaSAEError as error:
        sys.exit(str(error))
    os.chdir(REPOSITORY)
    Path("_build").mkdir(exist_ok=True)
    # A lock that the system drops when its holder dies. Snakemake's own stays behind after a
    # kill, and would ask the reader to unlock by hand: it is switched off below.
    lock = os.open("_build/.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("Another make book is at work in this folder: wait for it, or end it.")
    os.set_inheritable(lock, True)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile",
        "--cores", "all", "--keep-going", "--nolock", "--rerun-incomplete",
        "--quiet", "all",
        "--config", f"profiles={' '.join(profiles)}",
    ]  # fmt: skip
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
