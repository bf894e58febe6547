"""Kept runs: stored whole or not at all, refused when edited, compared with a fresh run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rocrate.rocrate import ROCrate

from metasae_lib import Profile, Run
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.kept import LIMIT, KeptRun, agreement, keep, kept_runs


@pytest.fixture
def finished(run: Run) -> Run:
    run.save_table("effects", pd.DataFrame({"way": ["seeds"], "change_pct": [-2.0]}), "made up")
    run.save_table("scorecard", pd.DataFrame({"id": ["a"], "seconds": [1.0]}), "made up")
    run.save_table("large", pd.DataFrame({"x": np.arange(LIMIT)}), "too large to keep")
    run.save_json("headline", {"sentences": ["One."]})
    return run


def test_a_kept_run_is_read_as_the_run_is(finished: Run, tmp_path: Path) -> None:
    target = keep(finished.folder, tmp_path / "results")
    (kept,) = kept_runs(tmp_path / "results")
    assert kept.folder == target and kept.name == finished.name
    assert kept.load_table("effects").equals(finished.load_table("effects"))
    assert kept.load_json("headline") == {"sentences": ["One."]}
    assert kept.has_table("scorecard") and not kept.has_table("large")
    assert kept.provenance()["commit"] == finished.provenance()["commit"]
    assert kept.provenance()["table"] == "scorecard"
    keep(finished.folder, tmp_path / "results")  # again, over the old one
    # A profile that has got a new key since leaves what was kept as it is.
    profile = tmp_path / "results" / finished.name / "profile.yml"
    assert "seeds_grid" in profile.read_text()


def test_a_kept_run_is_a_crate(finished: Run, tmp_path: Path) -> None:
    """Read back by the library, and held to what RO-Crate 1.1 asks of every crate."""
    target = keep(finished.folder, tmp_path / "results")
    graph = json.loads((target / "ro-crate-metadata.json").read_text())["@graph"]
    found = {entity["@id"]: entity for entity in graph}
    descriptor, root = found["ro-crate-metadata.json"], found["./"]
    assert descriptor["about"] == {"@id": "./"} and descriptor["@type"] == "CreativeWork"
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and root["name"] and root["description"]
    assert root["datePublished"] == finished.table_record("scorecard")["date"]
    assert root["license"]["@id"] in found
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert {part["@id"] for part in root["hasPart"]} == files - {descriptor["@id"]}
    for name in files - {descriptor["@id"]}:
        assert found[name]["sha256"] == hashlib.sha256((target / name).read_bytes()).hexdigest()
    references = [v["@id"] for e in graph for v in e.values() if isinstance(v, dict)]
    assert set(references) - {"https://w3id.org/ro/crate/1.1"} <= set(found)
    crate = ROCrate(target)
    (action,) = crate.get_by_type("CreateAction")
    assert finished.provenance()["commit"] in action["instrument"]["softwareVersion"]
    assert action["object"].id == "profile.yml"
    assert crate.get("tables/effects.csv")["description"] == "made up"


def test_nothing_is_saved_into_a_kept_run(finished: Run, tmp_path: Path) -> None:
    kept = KeptRun(keep(finished.folder, tmp_path / "results"))
    kept.save_table("effects", pd.DataFrame({"x": [1]}), "another")
    kept.save_json("headline", {"sentences": []})
    assert KeptRun(kept.folder).load_json("headline") == {"sentences": ["One."]}


@pytest.mark.parametrize("name", ["tables/effects.csv", "values/headline.json", "profile.yml"])
def test_an_edited_file_is_refused(name: str, finished: Run, tmp_path: Path) -> None:
    target = keep(finished.folder, tmp_path / "results")
    path = target / name
    path.write_text(path.read_text().replace("2.0", "7.5").replace("One.", "Two.") + "\n")
    with pytest.raises(ArtefactError, match=r"was edited or lost since it was kept"):
        KeptRun(target)


def test_what_cannot_be_kept_leaves_nothing(finished: Run, tmp_path: Path) -> None:
    results = tmp_path / "results"
    finished.save_table("arms", pd.DataFrame({"l2": [np.inf]}), "made up")
    with pytest.raises(ArtefactError, match=r"arms\.csv holds an infinite number"):
        keep(finished.folder, results)
    path = finished.folder / "tables" / "arms.csv"
    path.write_text("l2\n0.1\n")
    with pytest.raises(ArtefactError, match="was changed after it was made"):
        keep(finished.folder, results)
    path.unlink()
    record = finished.folder / "tables" / "effects.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"profile_hash": "another"}))
    with pytest.raises(ArtefactError, match="has no table 'effects' for this profile"):
        keep(finished.folder, results)
    with pytest.raises(ArtefactError, match="is not the folder of a run"):
        keep(tmp_path / "nowhere", results)
    assert not results.exists() or not list(results.iterdir())


def test_a_run_without_scorecard_is_not_finished(run: Run, tmp_path: Path) -> None:
    run.save_table("effects", pd.DataFrame({"x": [1]}), "made up")
    with pytest.raises(ArtefactError, match="no table scorecard yet"):
        keep(run.folder, tmp_path / "results")


def test_agreement_of_a_fresh_run_with_the_kept_one(tmp_path: Path, tiny: Profile) -> None:
    old, new = (Run.open(tiny, tmp_path / name) for name in ("old", "new"))
    frame = pd.DataFrame({"arm": ["a", "b"], "x": [1.0, 2.0], "seconds": [1.0, 2.0]})
    for run in (old, new):
        run.save_table("scorecard", frame, "made up")
    for name in ("rounded", "moved", "renamed", "longer", "lost"):
        old.save_table(name, frame, "made up")
    new.save_table("rounded", frame.assign(x=[1.0, 2.0 + 1e-9], seconds=7.0), "made up")
    new.save_table("moved", frame.assign(x=[1.0, 2.2]), "made up")
    new.save_table("renamed", frame.assign(arm=["a", "c"]), "made up")
    new.save_table("longer", pd.concat([frame, frame]), "made up")
    kept = KeptRun(keep(old.folder, tmp_path / "results"))
    found = agreement(new, kept).set_index("table")
    assert found.agreement.to_dict() == {
        "longer": "differs", "lost": "not in this run", "moved": "differs", "renamed": "differs",
        "rounded": "within rounding", "scorecard": "equal",
    }  # fmt: skip
    assert found.loc["moved", "where"] == "x, by up to 10%"
    assert found.loc["renamed", "where"] == "arm" and "4 rows" in found.loc["longer", "where"]
