"""What a result was made with: commit, hardware, versions of libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "metasae-lib", "torch", "transformers", "transformer_lens", "numpy", "numba", "scipy", "pandas"
)  # fmt: skip


def _printed(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def commit() -> str:
    """Commit of the sources, "+changes" on a dirty tree. Outside of git, as on a machine that they
    were copied to, what METASAE_COMMIT says, or "unknown"."""
    git = ("git", "-C", str(Path(__file__).parent))
    head, changes = _printed(*git, "rev-parse", "HEAD"), _printed(*git, "status", "--porcelain")
    if head is None or changes is None:
        return os.environ.get("METASAE_COMMIT", "unknown")
    return head + ("+changes" if changes else "")


@cache
def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, and the GPUs by name."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.M
        )
        processor = named.group(1) if named else processor
    usable = getattr(os, "sched_getaffinity", None)
    gpus = _printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": len(usable(0)) if usable else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus.splitlines(),
        "system": platform.platform(),
    }


@cache
def libraries() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def made_with() -> dict[str, Any]:
    """What is recorded beside every result: commit, hardware, libraries, and the date."""
    return {
        "commit": commit(),
        "hardware": hardware(),
        "libraries": libraries(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
