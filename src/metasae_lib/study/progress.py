"""One progress bar for the whole library: shown on a terminal, silent everywhere else."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm


class _Written(tqdm):
    """A bar that writes its state to the file named in $METASAE_PROGRESS, the only line there.

    When it closes, the file holds the bar around it again, or nothing.
    """

    _instances: ClassVar[Any]  # tqdm's own set of the bars that are open

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """What tqdm calls whenever the bar would be drawn; with `msg` "" to wipe it out."""
        Path(os.environ["METASAE_PROGRESS"]).write_text(
            str(self) if msg is None else msg, encoding="utf-8"
        )

    def close(self) -> None:
        """Also of a bar that its owner leaves before its end."""
        if self.disable:  # closed already
            return
        super().close()
        around = max(self._instances, key=lambda bar: abs(bar.pos), default=None)
        if around is None:
            self.display("")
        else:
            around.refresh()


def progress(iterable_or_total: Iterable[Any] | int, desc: str) -> tqdm[Any]:
    """Wrap an iterable, or make a bar of a given total for `with` and `.update(n)`.

    Notebooks, logs and pipes get nothing: a redrawn bar floods an executed page. A workflow that
    runs notebooks names a file in $METASAE_PROGRESS, and reads there which bar is open.
    """
    options: dict[str, Any] = {"desc": desc, "leave": False}
    options["total" if isinstance(iterable_or_total, int) else "iterable"] = iterable_or_total
    if os.environ.get("METASAE_PROGRESS"):
        return _Written(**options, file=io.StringIO(), mininterval=5, ncols=100)
    return tqdm(**options, disable=None)  # off a terminal
