"""What a model or a text is: keys that follow every byte, hub names that mean one commit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_hub import SmallHub
from small_models import save_model, save_text, small_profile
from transformers import AutoModelForCausalLM

from metasae_lib import Run
from metasae_lib.study import CorpusError, SubjectError, files
from metasae_lib.study.files import content_hash, sha256_of
from metasae_lib.subject import load_subject, load_tokens
from metasae_lib.subject.model import fingerprint
from metasae_lib.subject.origin import hub_commit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def flip(path: Path, place: int) -> None:
    """Change one bit of a file, and give it back its old time."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_large_file_counts_whole_and_is_read_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(20 * 2**20))
    read: list[Path] = []
    monkeypatch.setattr(files, "_CLOCK_TICK", 0)
    monkeypatch.setattr(files, "sha256_of", lambda each: read.append(each) or sha256_of(each))
    first = content_hash(path)
    assert content_hash(path) == first == sha256_of(path)
    assert read == [path]
    flip(path, 10 * 2**20)
    assert content_hash(path) == sha256_of(path) != first


def test_a_change_in_the_middle_of_the_weights_is_another_model(
    model: Path, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    # A second, large file of weights: 20 MiB, of which the ends stay the same.
    (copy / "more.safetensors").write_bytes(bytes(20 * 2**20))
    before = fingerprint(small_profile(copy, text))
    flip(copy / "more.safetensors", 10 * 2**20)
    assert fingerprint(small_profile(copy, text)) != before
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert len({str(fingerprint(small_profile(folder, text))) for folder in (model, copy)}) == 2


def test_replaced_text_of_a_dataset_folder_is_other_text(
    model: Path, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    table = pd.read_json(text, lines=True)
    table.to_parquet(folder / "train.parquet")
    profile = small_profile(model, text, **{"text.source": f"hf:{folder}"})
    first = load_tokens(Run.open(profile, tmp_path / "runs"))
    table[::-1].to_parquet(folder / "train.parquet")
    second = load_tokens(Run.open(profile, tmp_path / "runs"))
    assert first.hash("train") != second.hash("train")


def test_a_hub_model_is_its_commit(
    hub: SmallHub, model: Path, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    uploaded = tmp_path / "uploaded"
    shutil.copytree(model, uploaded)
    hub.repositories["models/some/model"] = uploaded
    profile = small_profile(model, text, **{"model.source": "hub:some/model"})
    commit = hub.commit("models/some/model")
    assert fingerprint(profile)["identity"] == commit
    ids = np.arange(16)[None]
    ours = load_subject(profile).residuals(ids)
    assert ours.equal(load_subject(small_profile(model, text)).residuals(ids))

    # What is uploaded later is another model, which a run that began does not take.
    flip(uploaded / "model.safetensors", (uploaded / "model.safetensors").stat().st_size - 1)
    assert hub.commit("models/some/model") != commit
    assert fingerprint(profile)["identity"] == commit
    asked = len(hub.asked)
    assert load_subject(profile).residuals(ids).equal(ours)
    assert not [path for path in hub.asked[asked:] if path.endswith(".safetensors")]
    pinned = small_profile(model, text, **{"model.source": f"hub:some/model@{'0' * 40}"})
    assert fingerprint(pinned)["identity"] == "0" * 40
    with pytest.raises(SubjectError, match=r"hub model some/model@0+ could not be downloaded"):
        load_subject(pinned)
    with pytest.raises(SubjectError, match="model nobody/none could not be reached"):
        hub_commit("model", "nobody/none")


def test_shards_of_a_gated_model_with_the_token_of_the_environment(
    hub: SmallHub, model: Path, text: Path, own_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    uploaded = tmp_path / "uploaded"
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.save_pretrained(uploaded, max_shard_size="20KB")
    assert len(list(uploaded.glob("model-*.safetensors"))) > 2
    for path in model.glob("*token*"):
        shutil.copy(path, uploaded)
    hub.repositories["models/some/gated"] = uploaded
    hub.token = "hf_secret"
    profile = small_profile(model, text, **{"model.source": "hub:some/gated"})
    with pytest.raises(
        SubjectError, match=r"some/gated could not be downloaded .*HF_TOKEN"
    ) as said:
        load_subject(profile)
    assert "\n" not in str(said.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    ids = np.arange(16)[None]
    ours = load_subject(profile).residuals(ids)
    assert ours.equal(load_subject(small_profile(model, text)).residuals(ids))
    assert fingerprint(profile)["identity"] == hub.commit("models/some/gated")


def test_a_hub_dataset_is_its_commit(
    hub: SmallHub, model: Path, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    table = pd.read_json(text, lines=True)
    table.to_parquet(uploaded / "train.parquet")
    hub.repositories["datasets/some/text"] = uploaded
    profile = small_profile(model, text, **{"text.source": "hf:some/text"})
    made = load_tokens(Run.open(profile, tmp_path / "runs"))
    local = small_profile(model, text, **{"text.source": f"hf:{uploaded}"})
    assert made.hash("train") == load_tokens(Run.open(local, tmp_path / "runs")).hash("train")
    table[::-1].to_parquet(uploaded / "train.parquet")
    again = load_tokens(Run.open(profile, tmp_path / "runs"))
    assert again.hash("train") == made.hash("train")
    shutil.rmtree(own_cache / "revisions")
    newer = load_tokens(Run.open(profile, tmp_path / "runs"))
    assert newer.hash("train") != made.hash("train")
    with pytest.raises(CorpusError, match="dataset nobody/none could not be reached"):
        hub_commit("dataset", "nobody/none")
