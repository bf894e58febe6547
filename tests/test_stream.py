"""A text of the hub over a bad network: after cuts, stalls, faults and kills the same tokens."""

from __future__ import annotations

import gzip
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
from small_hub import STALL, SmallHub
from small_models import save_model, save_text, small_profile

from metasae_lib import Profile, Run
from metasae_lib.study import ArtefactError, CorpusError
from metasae_lib.study.sections import ROLES
from metasae_lib.subject import corpus, gathering, stream
from metasae_lib.subject.corpus import load_tokens

SHARDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def uploaded(hub: SmallHub, tmp_path: Path) -> Path:
    """A dataset of 20 parquet files on the hub, of which an eighth is said twice."""
    table = pd.read_json(save_text(tmp_path / "text.jsonl"), lines=True)
    table = pd.concat([table, table[::8]], ignore_index=True)
    folder = tmp_path / "uploaded"
    folder.mkdir(parents=True)
    for k, part in enumerate(np.array_split(np.arange(len(table)), SHARDS)):
        table.loc[part].to_parquet(folder / f"train-{k:05d}.parquet", row_group_size=3)
    hub.repositories["datasets/some/text"] = folder
    return folder


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long: not we, not `datasets`, not the hub's library."""
    import datasets
    from huggingface_hub import constants

    pause = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: pause(min(seconds, STALL if seconds == STALL else 0.01))
    )
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", STALL / 4)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)


def profile_of(model: Path, **changes: Any) -> Profile:
    """Roles that take most of the text."""
    roles = {"train": 8000, "calibration": 500, "scan": 3000, "contexts": 900}
    given = {"text.source": "hf:some/text", "text.roles": roles}
    return small_profile(model, Path("none"), **given | changes)


def hashes(profile: Profile, folder: Path) -> dict[str, str]:
    made = load_tokens(Run.open(profile, folder))
    return {role: made.hash(role) for role in ROLES}


@pytest.mark.usefixtures("uploaded", "in_a_hurry")
def test_a_hundred_faults_change_nothing(
    hub: SmallHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BATCH", 8)
    expected = hashes(profile_of(model), tmp_path / "good")
    kinds, met = itertools.cycle(["cut", "503", "cut", "cut", "503", "stall"]), Counter[str]()

    def fault(path: str) -> str:
        met[path] += 1
        # The first bytes come: what never worked at all is not waited for.
        return next(kinds) if hub.faults < 100 and met.total() > 3 and met[path] < 12 else ""

    hub.fault = fault
    assert hashes(profile_of(model), tmp_path / "bad") == expected
    assert hub.faults == 100


def _read_until_killed(profile: Profile, folder: Path) -> None:
    load_tokens(Run.open(profile, folder))


@pytest.mark.usefixtures("uploaded", "in_a_hurry")
def test_a_killed_reading_goes_on_where_it_was(
    hub: SmallHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BATCH", 4)
    monkeypatch.setattr(corpus, "_SAVE_SECONDS", 0)
    expected = hashes(profile_of(model), tmp_path / "whole")
    shards = len({path for path in hub.asked if path.endswith(".parquet")})
    # A server that falls silent in the middle, and a reader that is killed while it waits.
    held = {f"train-{k:05d}" for k in range(shards // 2, SHARDS)}
    hub.fault = lambda path: "stall" if any(name in path for name in held) else ""
    reader = multiprocessing.get_context("fork").Process(
        target=_read_until_killed, args=(profile_of(model), tmp_path / "killed")
    )
    reader.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not hub.faults:
        time.sleep(0.05)
    os.kill(reader.pid or 0, signal.SIGKILL)
    reader.join()
    hub.fault = lambda path: ""
    hub.asked.clear()
    assert hashes(profile_of(model), tmp_path / "killed") == expected
    again = {path for path in hub.asked if path.endswith(".parquet")}
    assert 0 < len(again) < shards  # what had been read was not asked for again
    (folder,) = (tmp_path / "killed" / "artefacts").glob("tokens-*/")
    assert not [path for path in folder.iterdir() if path.suffix not in (".npy", ".json")]
    assert not (folder / "gathered.json").exists()


@pytest.mark.usefixtures("in_a_hurry")
def test_what_patience_does_not_cure_is_one_sentence(
    hub: SmallHub, uploaded: Path, model: Path, tmp_path: Path
) -> None:
    hub.fault = lambda path: "401"
    with pytest.raises(CorpusError, match="dataset some/text could not be read") as caught:
        hashes(profile_of(model), tmp_path / "gated")
    assert "\n" not in str(caught.value)
    hub.fault = lambda path: "503" if "train-00004" in path else ""
    with pytest.raises(CorpusError, match="goes on where reading stopped"):
        hashes(profile_of(model), tmp_path / "gone")
    hub.fault = lambda path: ""
    with pytest.raises(CorpusError, match=r"text\.column is 'body', but the dataset some/text"):
        hashes(profile_of(model, **{"text.column": "body"}), tmp_path / "column")


def test_a_full_disk_while_reading(
    small_disk: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids do not fit; what fits is kept."""
    text = save_text(tmp_path / "text.jsonl")
    monkeypatch.setattr(corpus, "_BATCH", 4)
    monkeypatch.setattr(corpus, "_SAVE_SECONDS", 0)
    profile = small_profile(model, text)
    expected = hashes(profile, tmp_path / "runs")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8 * 2**10))
    with pytest.raises(ArtefactError, match="free some space"):
        hashes(profile, small_disk)
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert hashes(profile, small_disk) == expected


def test_compressed_files_hold_the_same(model: Path, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.jsonl")
    content, expected = text.read_bytes(), hashes(small_profile(model, text), tmp_path / "runs")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        assert hashes(small_profile(model, tmp_path / name), tmp_path / "runs") == expected
    plain = "\n\n".join(["some words in a row"] * 4000).encode()
    (tmp_path / "c.txt").write_bytes(plain)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(plain))
    found = [list(corpus._read(tmp_path / name, "text")) for name in ("c.txt", "d.txt.gz")]
    assert found[0] == found[1] and len(found[0]) > 5
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(content)[:-40])
    with pytest.raises(CorpusError, match=r"e\.jsonl\.gz could not be read"):
        list(corpus._read(tmp_path / "e.jsonl.gz", "text"))


def test_gathered_ids_by_hand(tmp_path: Path) -> None:
    """Two documents, a kill after the first was saved, and the second again."""
    with gathering.Gathering(tmp_path) as first:
        first.add("train", "b", [1, 2, 3])
        assert first.is_new(b"x" * 32) and not first.is_new(b"x" * 32)
        first.save({"at": 1})
        first.add("train", "a", [9, 9])
    with gathering.Gathering(tmp_path) as second:
        assert second.state == {"at": 1} and second.held == {"train": 3}
        assert not second.is_new(b"x" * 32) and second.is_new(b"y" * 32)
        second.add("train", "a", [4, 5, 6])
    second.write_rows("train", 2, 3, bos=0)
    assert np.load(tmp_path / "train.npy").tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    # Where each document begins among the ids, without BOS, and whose it is.
    assert np.load(tmp_path / "train-documents.npy").tolist() == [[0, 1], [3, 0]]
    assert second.names == ["a", "b"]
    assert stream._passing(TimeoutError()) and not stream._passing(ValueError())
