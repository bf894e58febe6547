"""One progress bar for the whole library: shown on a terminal, silent everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(iterable_or_total: Iterable[Any] | int, desc: str) -> tqdm[Any]:
    """Wrap an iterable, or make a bar of a given total for `with` and `.update(n)`.

    Notebooks, logs and pipes get nothing: a redrawn bar floods an executed page.
    """
    total, iterable = (
        (iterable_or_total, None)
        if isinstance(iterable_or_total, int)
        else (None, iterable_or_total)
    )
    return tqdm(iterable, desc=desc, total=total, disable=not sys.stderr.isatty(), leave=False)
