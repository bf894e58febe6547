"""Runs on disk: keys, completeness, locks, atomic writes, tables and provenance."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from metasae_lib import Profile, Run
from metasae_lib.study.errors import ArtefactError
from metasae_lib.study.files import atomic_write, cache_folder, to_json
from metasae_lib.study.machine import commit
from metasae_lib.study.progress import progress
from metasae_lib.study.run import Artefact, locked


def finished(run: Run) -> Artefact:
    """A finished artefact of two files, one in a sub-folder."""
    artefact = run.artefact("tokens", {"seed": 0})
    with artefact.lock():
        (artefact.folder / "train.bin").write_bytes(b"0123456789")
        (artefact.folder / "more").mkdir()
        (artefact.folder / "more" / "scan.bin").write_bytes(b"abc")
        artefact.finish({"hashes": {"train": "00ff"}})
    return artefact


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_open_writes_the_resolved_profile_once(run: Run, tiny: Profile) -> None:
    path = run.folder / "profile.yml"
    assert yaml.safe_load(path.read_text()) == tiny.model_dump()
    before = path.stat().st_mtime_ns
    Run.open(tiny, run.runs_dir)
    assert path.stat().st_mtime_ns == before
    assert run.name == "tiny" and run.folder.parent == run.runs_dir


def test_overrides_never_touch_the_base_run(run: Run) -> None:
    run.save_table("grid", pd.DataFrame({"x": [1]}), "A table.")
    before = contents(run.folder)
    other = Run.open(Profile.load("tiny", {"training.lambda2": [0.1]}), run.runs_dir)
    other.save_table("grid", pd.DataFrame({"x": [2]}), "A table.")
    other.save_json("value", 3)
    other.write_manifest()
    assert contents(run.folder) == before
    assert other.name == f"tiny-{other.profile.overrides_hash}" != run.name
    assert other.provenance()["overrides"] == {"training.lambda2": [0.1]}


def test_keys_follow_stage_inputs_and_version(run: Run) -> None:
    key = run.artefact("a", {"x": 1, "y": [1.5, None]}).key
    assert run.artefact("a", {"y": (np.float64(1.5), None), "x": np.int64(1)}).key == key
    others = [
        run.artefact("b", {"x": 1, "y": [1.5, None]}),
        run.artefact("a", {"x": 2, "y": [1.5, None]}),
        run.artefact("a", {"x": 1, "y": [1.5, None]}, version=2),
    ]
    assert len({key, *(other.key for other in others)}) == 4
    assert all(len(other.key) == 16 for other in others)


def test_artefact_is_complete_only_when_finished(run: Run) -> None:
    artefact = run.artefact("tokens", {"seed": 0})
    (artefact.folder / "train.bin").write_bytes(b"half")
    assert artefact.folder.is_dir() and not artefact.complete
    with pytest.raises(ArtefactError, match="is not finished"):
        _ = artefact.info
    made = finished(run)
    again = run.artefact("tokens", {"seed": 0})
    assert again.complete and again.folder == made.folder
    info = again.info
    assert info["inputs"] == {"seed": 0} and info["hashes"] == {"train": "00ff"}
    assert info["files"] == {
        "train.bin": {"size": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
        "more/scan.bin": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
    }
    assert {"seconds", "commit", "hardware", "libraries", "date"} <= info.keys()


def test_no_second_is_counted_for_two_artefacts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("metasae_lib.study.run.time.monotonic", lambda: now)
    first, second = (run.artefact("outer", {"i": i}) for i in range(2))
    with locked([first, second]):
        now += 1
        inner = run.artefact("inner", {})
        with inner.lock():
            now += 2
            inner.finish()
        now += 4
        first.finish()
        now += 8
        second.finish()
    assert [one.info["seconds"] for one in (inner, first, second)] == [2, 1 + 4, 8]
    assert run.provenance()["run_seconds"] == 15


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"01234"), "train.bin has 5 bytes"),
        (lambda folder: (folder / "train.bin").write_bytes(b"0123456780"), "train.bin was changed"),
        (lambda folder: (folder / "more" / "scan.bin").unlink(), "more/scan.bin is missing"),
        (lambda folder: (folder / "artefact.json").write_text('{"key'), "artefact.json cannot be"),
        (lambda folder: (folder / "artefact.json").write_text("[]"), "belongs to something else"),
        (lambda folder: (folder / "artefact.json").write_text('{"key": "x", "files": {}}'),
         "belongs to something else"),
    ],
)  # fmt: skip
def test_harmed_artefacts_are_named(run: Run, harm, words: str) -> None:  # type: ignore[no-untyped-def]
    folder = finished(run).folder
    harm(folder)
    with pytest.raises(ArtefactError, match=f"delete {folder.name} and run again") as caught:
        _ = run.artefact("tokens", {"seed": 0}).complete
    assert words in str(caught.value) and "\n" not in str(caught.value)


HOLDER = """
import sys, time
from metasae_lib import Profile, Run
artefact = Run.open(Profile.load("tiny"), sys.argv[1]).artefact("slow", {})
with artefact.lock():
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    (artefact.folder / "file").write_text("made by the other")
    artefact.finish()
"""


def test_the_lock_waits_for_the_maker(run: Run) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.runs_dir), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        artefact = run.artefact("slow", {})
        assert not artefact.complete
        with artefact.lock():
            assert artefact.complete  # it waited until the other had finished
        assert other.wait() == 0


def test_a_killed_maker_frees_the_lock_and_leaves_nothing_complete(run: Run) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.runs_dir), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.kill()
        artefact = run.artefact("slow", {})
        start = time.monotonic()
        with artefact.lock():
            assert not artefact.complete
        assert time.monotonic() - start < 5


def test_atomic_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    with atomic_write(path) as temporary:
        np.save(temporary, np.arange(3))
        assert not path.exists() and temporary.suffix == ".npy"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert np.load(path).tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["weights.npy"]


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 10**9),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 10**9),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9),  # safetensors
        (RuntimeError("unexpected pos 704 vs 598"), 0),  # what torch.save makes of it
    ],
)
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    path = tmp_path / "file.csv"
    path.write_text("old")
    with pytest.raises(ArtefactError, match=r"the disk is full: file\.csv"), atomic_write(path):
        raise error
    assert os.listdir(tmp_path) == ["file.csv"] and path.read_text() == "old"


def test_tables_come_back_as_they_were(run: Run) -> None:
    frame = pd.DataFrame(
        {"arm": ["solo-seed0", "joint"], "phi": [2.27e-3, 1 / 3], "dead": [0, 2], "ce": [np.nan, 1]}
    )
    path = run.save_table("fidelity", frame, "L2 and CE of every arm.")
    assert path == run.folder / "tables" / "fidelity.csv"
    pd.testing.assert_frame_equal(run.load_table("fidelity"), frame)
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside["about"] == "L2 and CE of every arm." and beside["rows"] == 2
    assert beside["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    floats = pd.DataFrame({"x": np.random.default_rng(0).standard_normal(1000) * 1e-7})
    run.save_table("floats", floats, "Every bit of a float64 survives.")
    assert (run.load_table("floats")["x"] == floats["x"]).all()
    words = pd.DataFrame({"word": ["null", "None", "NA", None], "x": [1.0, None, 2.0, 3.0]})
    run.save_table("words", words, "Words that pandas would take for missing, and missing values.")
    pd.testing.assert_frame_equal(run.load_table("words"), words)
    ends = pd.DataFrame([(f"a{c}b", f"{c}x", f"x{c}") for c in "\r\n\u2028\x85\v\f\x1c\0\u202e"])
    ends = ends.rename(columns=str)
    path_of_ends = run.save_table("ends", ends, "What ends a line for some readers.")
    pd.testing.assert_frame_equal(run.load_table("ends"), ends, check_column_type=False)
    with path_of_ends.open(newline="", encoding="utf-8") as lines:
        assert [tuple(row) for row in csv.reader(lines)][1:] == list(ends.itertuples(index=False))
    path.write_text("arm,phi\nx,1\n")
    with pytest.raises(ArtefactError, match="was changed after it was made"):
        run.load_table("fidelity")


def test_missing_tables_name_the_notebook(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_training.py").write_text('run.save_table(\n    "own", frame)')
    monkeypatch.chdir(tmp_path)
    assert not run.has_table("own")
    with pytest.raises(ArtefactError, match="run the notebook 02_training first"):
        run.load_table("own")
    with pytest.raises(ArtefactError, match="cannot name a file"):
        run.save_json("../outside", 1)


def test_results_of_an_edited_profile_count_as_missing(tmp_path: Path, tiny: Profile) -> None:
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(tiny.model_dump()))
    run = Run.open(Profile.load(path), tmp_path / "runs")
    run.save_table("grid", pd.DataFrame({"x": [1]}), "A table.")
    run.save_json("value", [1])
    finished(run)
    reworded = tiny.model_dump() | {"about": "Said otherwise."}
    path.write_text(yaml.safe_dump(reworded))
    assert Run.open(Profile.load(path), tmp_path / "runs").has_table("grid")
    reworded["text"]["seed"] = 1
    path.write_text(yaml.safe_dump(reworded))
    edited = Run.open(Profile.load(path), tmp_path / "runs")
    assert not edited.has_table("grid") and edited.provenance()["token_hashes"] is None
    with pytest.raises(ArtefactError, match="no value 'value' for this profile"):
        edited.load_json("value")


def test_provenance_is_strict_json(run: Run) -> None:
    finished(run)
    run.save_json("numbers", {"nan": float("nan"), "inf": np.inf, "n": np.int32(3), "t": (1, 2)})
    path = run.folder / "values" / "numbers.json"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    saved = json.loads(path.read_text(), parse_constant=refuse)
    assert run.load_json("numbers") == {"nan": None, "inf": None, "n": 3, "t": [1, 2]}
    assert saved["token_hashes"] == {"train": "00ff"} and saved["run"] == "tiny"
    assert saved["seeds"] == {"text": 0, "training": [0, 1]}
    assert saved["hardware"]["cores"] >= 1 and saved["hardware"]["memory_gib"] > 0
    assert saved["libraries"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert saved["run_seconds"] >= 0
    with pytest.raises(TypeError):
        to_json({"x": object()})


def test_manifest_is_the_same_for_the_same_results(run: Run) -> None:
    path = run.save_table("b", pd.DataFrame({"x": [1.5]}), "B.")
    run.save_json("a", 1)
    first = run.write_manifest().read_text()
    assert json.loads(first)["tables"] == {"b": hashlib.sha256(path.read_bytes()).hexdigest()}
    time.sleep(1.1)  # dates have seconds; the manifest must hold none
    run.save_json("a", 1)
    assert run.write_manifest().read_text() == first
    run.save_json("a", 2)
    assert run.write_manifest().read_text() != first


def test_progress_is_silent_off_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    with progress(2, "updating") as bar:
        bar.update(2)
    assert capfd.readouterr() == ("", "")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METASAE_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" and cache_folder().is_dir()
    repository = Path(__file__).parents[1]
    monkeypatch.setenv("METASAE_CACHE", os.path.relpath(tmp_path / "other", repository))
    for place in (repository, repository / "notebooks"):  # a command and a kernel
        monkeypatch.chdir(place)
        assert cache_folder().resolve() == (tmp_path / "other").resolve()
    monkeypatch.setenv("METASAE_CACHE", "/dev/null/cache")
    with pytest.raises(ArtefactError, match="cannot be made"):
        cache_folder()


def test_commit_outside_of_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    commit.cache_clear()
    monkeypatch.delenv("METASAE_COMMIT", raising=False)
    assert commit() == "unknown"
    commit.cache_clear()
    monkeypatch.setenv("METASAE_COMMIT", "1234abcd")  # said by who copied the sources there
    assert commit() == "1234abcd"
    commit.cache_clear()


def test_progress_of_a_workflow_is_the_bar_that_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bar"
    monkeypatch.setenv("METASAE_PROGRESS", str(file))
    with progress(4, "counting") as bar:
        bar.update(2)
        bar.refresh()
        assert file.read_text().startswith("counting:  50%")
        for _ in progress(range(3), "reading"):
            assert file.read_text().startswith("reading:   0%")
        assert file.read_text().startswith("counting:  50%")
    assert file.read_text() == ""
    with suppress(KeyboardInterrupt), progress(4, "counting"):
        raise KeyboardInterrupt
    assert file.read_text() == ""


def test_a_finished_bar_leaves_the_terminal() -> None:
    code = (
        "import sys; from metasae_lib.study import progress\n"
        "with progress(100, 'residuals') as bar: bar.update(54); bar.refresh()\n"
        "print('|', file=sys.stderr)"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {k: v for k, v in os.environ.items() if k != "METASAE_PROGRESS"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=environment)
    shown = os.read(ours, 2**16).decode()
    states = shown.split("\r")
    assert any("residuals:  54%" in state for state in states)
    wiped = next(i for i, state in enumerate(states) if "54%" in state) + 1
    assert not states[wiped].strip() and len(states[wiped]) >= len(states[wiped - 1].rstrip())
    assert states[wiped + 1] == "|"
