"""What of the artefacts of a runs folder may go, by kind, and what is lost with it."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.run import artefact_key

#: Kinds that can be freed, and what goes with each. Tokens, arms and measures that a run stands on
#: are of no kind, nor are any answers of judges, which may have been paid for.
KINDS = {
    "unused": "no run stands on it, or it is of an older version of its stage",
    "states": "of finished arms: training one for longer begins anew, to the same weights",
    "residuals": "of the language model: it runs again for a stage that is made anew",
    "counts": "of pairs: 03 and 05 count again if they run again",
    "contexts": "of features: 04 and 05 look for them again if they run again",
}
_KIND_OF = {
    "residuals": "residuals", "labelled-residuals": "residuals", "counts": "counts",
    "cross-counts": "counts", "shifted-counts": "counts", "contexts": "contexts",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """An artefact, or a state in one, that may go. size: bytes. seconds: what it took to make."""

    kind: str
    path: Path
    size: int
    seconds: float


def prunable(runs_dir: Path) -> list[Part]:
    """Everything of the kinds in a runs folder. Raises ArtefactError if it has no artefacts."""
    artefacts = runs_dir / "artefacts"
    if not artefacts.is_dir():
        raise ArtefactError(f"{runs_dir} holds no artefacts: name the folder of the runs")
    folders = {path.name: path for path in sorted(artefacts.glob("*-*/"))}
    made = {name: info for name, path in folders.items() if (info := _info(path))}
    unused = folders.keys() - _marked(runs_dir) | _outdated(made)
    found = []
    for name, path in folders.items():
        info = made.get(name, {})
        stage = name.rpartition("-")[0]
        kind = "unused" if name in unused else _KIND_OF.get(stage) if info else None
        if kind and stage != "answers":
            found.append((kind, path, info))
        if stage == "arm" and "steps" in info.get("inputs", {}) and _state(info) not in unused:
            final = artefacts / _state(info) / f"final-{info['inputs']['steps']}.safetensors"
            found += [("states", final, info)] if final.exists() else []
    return [Part(kind, path, _size(path), info.get("seconds", 0)) for kind, path, info in found]


def prune(runs_dir: Path, kinds: Sequence[str]) -> list[Part]:
    """Free what is of some kinds, and return it; what is locked stays.

    Raises ArtefactError, before anything is freed, for a kind that is none, and where a run at work
    may be reading it.
    """
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ArtefactError(f"'{wrong[0]}' is no kind of artefacts: name {', '.join(KINDS)}")
    artefacts, before = runs_dir / "artefacts", _marked(runs_dir)
    parts = [part for part in prunable(runs_dir) if part.kind in kinds]
    read = {part.kind for part in parts} & set(_KIND_OF.values())
    for lock in artefacts.glob("*.lock") if read else []:
        with _alone(lock) as free:
            if not free:
                raise ArtefactError(
                    f"a run is at work on {lock.stem} and may read {' and '.join(sorted(read))}: "
                    f"wait for its end or stop it, or free unused and states alone"
                )
    freed = []
    for part in parts:
        name = part.path.relative_to(artefacts).parts[0]
        with _alone(artefacts / f"{name}.lock") as free:
            if free and name not in _marked(runs_dir) - before:  # nor asked for just now
                _remove(part.path)
                freed.append(part)
    return freed


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
        return
    # Without this file, the remains of a killed removal count as never finished.
    (path / "artefact.json").unlink(missing_ok=True)
    shutil.rmtree(path)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Hold a lock; False if somebody else does."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _marked(runs_dir: Path) -> set[str]:
    """Names of the artefacts that some run has asked for."""
    return {marker.name for marker in runs_dir.glob("*/artefacts/[!.]*")}


def _outdated(made: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the artefacts of which a newer version of the stage is there, and of what was made
    from them."""
    newest: dict[str, int] = {}
    for info in made.values():
        newest[info["stage"]] = max(info["version"], newest.get(info["stage"], 0))
    gone = {name for name, info in made.items() if info["version"] < newest[info["stage"]]}
    from_ = {name: set(re.findall(r"[\w-]+-[0-9a-f]{16}", json.dumps(info["inputs"])))
             for name, info in made.items()}  # fmt: skip
    while more := {name for name, names in from_.items() if names & gone} - gone:
        gone |= more
    return gone


def _state(info: Mapping[str, Any]) -> str:
    """Name of the artefact in which the states of a trained arm are."""
    inputs = {name: value for name, value in info["inputs"].items() if name != "steps"}
    return f"arm-state-{artefact_key('arm-state', inputs, info['version'])}"


def _info(path: Path) -> dict[str, Any]:
    """What is recorded of an artefact; nothing if it is not finished."""
    try:
        return dict(json.loads((path / "artefact.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
