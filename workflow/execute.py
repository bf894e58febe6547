"""Run one notebook for one profile: python workflow/execute.py tiny notebooks/02_training.py

Papermill writes to the run's logs while it goes; only a notebook in which every cell ran is copied
to the run's notebooks. A failure leaves its traceback in the log and its end on the terminal.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from metasae_lib import Profile, Run
from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.files import atomic_write
from metasae_lib.study.machine import commit
from pages import ANSI, LINES_SHOWN, code_cells, unfinished

ATTEMPTS = 3  # kernels that start at once collide now and then
HEARTBEAT_SECONDS = 30
IOPUB_SECONDS = 120  # for what a finished cell has shown to arrive: four would end a busy machine's
# The environment's own kernel, whatever the notebook's header names.
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


class ExecutionError(Exception):
    """A notebook that cannot be run, or did not run to its end."""


class Reporter:
    """Says on the terminal which cell runs, and every half minute that it still does."""

    def __init__(self, name: str, progress_file: Path) -> None:
        self.name, self.progress_file = name, progress_file
        self.cell, self.started = "starting", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def enter_cell(self, number: int, total: int) -> None:
        self.cell, self.started = f"cell {number}/{total}", time.monotonic()
        self.say(self.cell)

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            minutes = (time.monotonic() - self.started) / 60
            self.say(f"{self.cell}, {minutes:.1f} min{self._progress()}")

    def _progress(self) -> str:
        """The state of the library's progress bar that is open, if one is."""
        try:
            state = self.progress_file.read_text(encoding="utf-8").strip()
        except OSError:
            return ""
        return f" · {state}" if state else ""


class ReportingEngine(NBClientEngine):
    """Papermill's own engine, which tells a reporter about every code cell."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        reporter: Reporter,
        **arguments: Any,
    ) -> None:
        cells = code_cells(nb_man.nb)
        numbers = {id(cell): number for number, cell in enumerate(cells, start=1)}
        start = nb_man.cell_start

        def cell_start(cell: nbformat.NotebookNode, *rest: Any, **named: Any) -> None:
            if id(cell) in numbers:
                reporter.enter_cell(numbers[id(cell)], len(cells))
            start(cell, *rest, **named)

        nb_man.cell_start = cell_start
        super().execute_managed_notebook(nb_man, kernel_name, **arguments)


papermill_engines.register("reporting", ReportingEngine)


def execute(source: Path, run: Run, overrides: dict[str, Any] | None = None) -> Path:
    """Run a percent notebook for a run; return the executed copy.

    ExecutionError, its message fit for a terminal, when a cell fails or the kernel dies.
    """
    source = source.resolve()
    logs, name = run.folder / "logs", source.stem
    converted, running, log = (logs / f"{name}.{end}" for end in ("input.ipynb", "ipynb", "log"))
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"], notebook.metadata["commit"] = KERNEL, commit()
    if not any("parameters" in c.metadata.get("tags", []) for c in code_cells(notebook)):
        raise ExecutionError(f"{source.name} has no cell tagged 'parameters': tag one.")
    # Relative to the notebook, as a reader's own default is: no path of this machine on a page.
    parameters = {
        "profile": run.profile.name,
        "overrides": overrides or {},
        "runs_dir": os.path.relpath(run.folder.parent, source.parent),
    }
    with (
        _alone(logs / f"{name}.lock"),
        Reporter(f"{run.name} {name}", logs / f"{name}.progress") as reporter,
    ):
        os.environ["METASAE_PROGRESS"] = str(reporter.progress_file)
        reporter.progress_file.unlink(missing_ok=True)
        nbformat.write(notebook, converted)
        for attempt in range(1, ATTEMPTS + 1):
            running.unlink(missing_ok=True)
            failure = _run_papermill(converted, running, parameters, source.parent, reporter)
            if not failure and not (reason := unfinished(nbformat.read(running, as_version=4))):
                break
            if attempt < ATTEMPTS and not _began(running):
                reporter.say("the kernel did not start, trying again")
                time.sleep(attempt)
                continue
            log.write_text(failure or f"{reason}: the kernel died.\n", encoding="utf-8")
            lines = "\n".join(log.read_text(encoding="utf-8").rstrip().splitlines()[-LINES_SHOWN:])
            raise ExecutionError(
                f"{lines}\n{name} failed for {run.name}; the whole traceback is in"
                f" {os.path.relpath(log)}, the notebook as far as it came in"
                f" {os.path.relpath(running)}"
            )
        finished = run.folder / "notebooks" / f"{name}.ipynb"
        with atomic_write(finished) as temporary:
            shutil.copyfile(running, temporary)
        run.write_manifest()
        log.unlink(missing_ok=True)
        reporter.say(f"done, at most {_peak_gb():.1f} GB of memory")
    return finished


def _peak_gb() -> float:
    """The most memory that a kernel of this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _run_papermill(
    source: Path, target: Path, parameters: dict[str, Any], folder: Path, reporter: Reporter
) -> str:
    """The traceback of the failure, or ''."""
    try:
        papermill.execute_notebook(
            _as_format(source),
            _as_format(target),
            parameters,
            engine_name="reporting",
            kernel_name=KERNEL["name"],
            progress_bar=False,
            cwd=folder,
            reporter=reporter,
            extra_arguments=["--log-level=CRITICAL"],
            iopub_timeout=IOPUB_SECONDS,
        )
    except PapermillExecutionError as error:
        return ANSI.sub("", "\n".join(error.traceback)) + "\n"
    # Whatever else a kernel dies of: the caller decides by the cells that ran.
    except Exception:
        return traceback.format_exc()
    return ""


def _as_format(path: Path) -> str:
    """A path for papermill, which fills parameters into the braces of its name."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _began(notebook: Path) -> bool:
    if not notebook.exists():
        return False
    cells = code_cells(nbformat.read(notebook, as_version=4))
    return any(cell.execution_count is not None or cell.outputs for cell in cells)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process: what a killed build left running is waited for."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.stem}: another process still runs it, waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("profile")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    arguments = parser.parse_args()
    try:
        execute(arguments.notebook, Run.open(Profile.load(arguments.profile), arguments.runs))
    except (ExecutionError, MetaSAEError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
