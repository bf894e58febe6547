"""A kept run as an RO-Crate 1.1 (researchobject.org): its files and how they were made, as JSON-LD.

Nothing is known here that the run's own provenance does not say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metasae_lib.study.files import sha256_of

LICENCE = "https://creativecommons.org/licenses/by/4.0/"
_PAPER = "https://arxiv.org/abs/2604.03436"
_FORMATS = {".csv": "text/csv", ".json": "application/json", ".yml": "application/yaml"}


def describe(folder: Path, about: str) -> Path:
    """Write `ro-crate-metadata.json` beside the `manifest.json` of a kept run; returns its path.

    about: what the run is of, in a sentence.
    """
    from rocrate.model import ContextEntity
    from rocrate.rocrate import ROCrate

    manifest = _read(folder / "manifest.json")
    made = manifest["made"]
    crate = ROCrate(version="1.1")
    licence = {"@type": "CreativeWork", "name": "CC BY 4.0"}
    paper = {"@type": "ScholarlyArticle", "name": "MetaSAEs (Levinson 2026)", "url": _PAPER}
    software = {
        "@type": "SoftwareApplication",
        "name": "metasae-lib",
        "softwareVersion": f"{made['libraries']['metasae-lib']}, commit {made['commit']}",
        "softwareRequirements": [f"{name} {v}" for name, v in made["libraries"].items()],
    }
    named = {LICENCE: licence, _PAPER: paper, "#library": software}
    entities = {i: crate.add(ContextEntity(crate, i, properties=p)) for i, p in named.items()}
    root = crate.root_dataset
    root["name"], root["description"] = f"Results of the run {made['run']}", about
    root["datePublished"] = made["date"]
    root["license"], root["isBasedOn"] = entities[LICENCE], entities[_PAPER]
    for name in [*manifest["files"], "manifest.json"]:
        crate.add_file(folder / name, name, properties=_file(folder, name))
    hardware = made["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    action = {
        "@type": "CreateAction",
        "name": f"The run {made['run']}",
        "endTime": made["date"],
        "description": f"{made['run_seconds']:,.0f} s of work on {machine}, {hardware['system']}",
    }
    run = crate.add(ContextEntity(crate, "#run", properties=action))
    run["instrument"], run["object"] = entities["#library"], crate.get("profile.yml")
    run["result"] = root
    root["mentions"] = run
    crate.metadata.write(folder)
    return folder / "ro-crate-metadata.json"


def _file(folder: Path, name: str) -> dict[str, Any]:
    """What is said of one file; of a table also what its record says that it holds."""
    path = folder / name
    said = {
        "name": name,
        "encodingFormat": _FORMATS[path.suffix],
        "contentSize": path.stat().st_size,
        "sha256": sha256_of(path),
    }
    if path.suffix == ".csv":
        said["description"] = _read(path.with_suffix(".json"))["about"]
    return said


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
