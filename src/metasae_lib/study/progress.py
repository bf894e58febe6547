"""One progress bar for the whole library: shown on a terminal, silent everywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(iterable_or_total: Iterable[Any] | int, desc: str) -> tqdm[Any]:
    """Wrap an iterable, or make a bar of a given total for `with` and `.update(n)`.

    Notebooks, logs and pipes get nothing: a redrawn bar floods an executed page. A workflow that
    runs notebooks names a file in $METASAE_PROGRESS, and reads the state of the bar from there.
    """
    options: dict[str, Any] = {"desc": desc, "leave": False, "disable": None}  # off a terminal
    options["total" if isinstance(iterable_or_total, int) else "iterable"] = iterable_or_total
    if path := os.environ.get("METASAE_PROGRESS"):
        # Held by the bar for as long as it lives; line-buffered, so that readers see every state.
        file = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        options |= {"file": file, "mininterval": 5, "ncols": 100, "disable": False}
    return tqdm(**options)
