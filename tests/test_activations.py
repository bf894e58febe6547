"""`activations`: chunks against the model itself, caching, and batches against a plain reading."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_model, save_text, small_profile
from torch import Tensor
from transformers import AutoModelForCausalLM

from metasae_lib import Run
from metasae_lib.study.errors import ArtefactError
from metasae_lib.subject import activations
from metasae_lib.subject.activations import BatchStream, Residuals
from metasae_lib.subject.corpus import load_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_run(model: Path, tmp_path: Path) -> Any:
    text = save_text(tmp_path / "text.jsonl")

    def make(folder: str = "runs", **changes: Any) -> Run:
        return Run.open(small_profile(model, text, **changes), tmp_path / folder)

    return make


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on a load of the language model fails."""

    def forbid() -> None:
        def load(profile: object) -> None:
            raise AssertionError("the language model was loaded")

        monkeypatch.setattr(activations, "subject_of", load)

    return forbid


@pytest.mark.parametrize("cache", [True, False])
def test_chunks_are_the_residuals_of_the_rows(make_run: Any, model: Path, cache: bool) -> None:
    run = make_run(activations__cache=cache)
    residuals = Residuals(run, "scan")
    rows = load_tokens(run).rows("scan")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = reference(
            torch.from_numpy(rows.astype(np.int64)), output_hidden_states=True
        ).hidden_states[2]
    chunks = list(residuals)
    assert [len(chunk) for chunk in chunks] == [7 * 15, 7 * 15, 2 * 15]
    assert [residuals.chunk_tokens(i) for i in range(3)] == [105, 105, 30]
    assert (residuals.n_tokens, residuals.d, residuals.n_chunks) == (240, 32, 3)
    torch.testing.assert_close(torch.cat(chunks), hidden[:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(IndexError):
        residuals.chunk(3)


def test_held_out_text_passes_through_the_model_once_also_without_a_cache(
    make_run: Any, monkeypatch: Any
) -> None:
    computed: list[tuple[str, int]] = []
    original = Residuals._compute

    def counting(self: Residuals, index: int, *part: slice) -> Tensor:
        computed.append((self.role, index))
        return original(self, index, *part)

    monkeypatch.setattr(Residuals, "_compute", counting)
    streamed, cached = (make_run(f"cache-{on}", activations__cache=on) for on in (False, True))
    for role in ("calibration", "scan", "contexts", "train"):
        residuals = Residuals(streamed, role)
        passes = [list(residuals), list(residuals), list(Residuals(streamed, role))]
        times = 3 if role == "train" else 1
        assert sorted(computed) == sorted([(role, i) for i in range(residuals.n_chunks)] * times)
        computed.clear()
        expected = list(Residuals(cached, role))
        assert all(torch.equal(a, b) for one in passes for a, b in zip(one, expected, strict=True))
        computed.clear()


def test_a_disk_without_room_is_told_before_the_model_runs(
    make_run: Any, no_model: Any, monkeypatch: Any
) -> None:
    no_model()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    residuals = Residuals(make_run(activations__cache=False), "scan")
    monkeypatch.setattr(Residuals, "d", 32)
    with pytest.raises(ArtefactError, match=r"role scan take .* make text\.roles\.scan smaller"):
        residuals.chunk(0)


def test_position_0_is_kept_on_request(make_run: Any) -> None:
    run = make_run(text__skip_first=False)
    kept = Residuals(run, "scan")
    assert kept.n_tokens == len(load_tokens(run).rows("scan")) * 16 == sum(map(len, kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_and_stream_agree_bit_for_bit(make_run: Any, no_model: Any, dtype: str) -> None:
    streamed = list(Residuals(make_run(activations__cache=False, model__dtype=dtype), "train"))
    run = make_run(model__dtype=dtype)
    for _ in range(2):  # computed, then read without the model
        cached = list(Residuals(run, "train"))
        assert all(torch.equal(a, b) for a, b in zip(streamed, cached, strict=True))
        assert cached[0].dtype == getattr(torch, dtype)
        no_model()


def test_a_killed_extraction_goes_on(make_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    expected = list(Residuals(make_run(), "train"))
    run = make_run("killed")
    computed: list[int] = []
    original = Residuals._compute

    def dying(self: Residuals, index: int) -> Tensor:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(index)
        return original(self, index)

    monkeypatch.setattr(Residuals, "_compute", dying)
    with pytest.raises(KeyboardInterrupt):
        Residuals(run, "train").chunk(0)
    (folder,) = tmp_path.glob("killed/artefacts/residuals-*/")
    cut = folder / "00001.npy"
    cut.write_bytes(cut.read_bytes()[:-50])

    computed.clear()
    computed.extend([-1] * 4)  # never again three
    again = list(Residuals(run, "train"))
    assert computed[4:] == [1, *range(3, len(expected))]  # the cut one and the missing ones
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))

    cut.write_bytes(cut.read_bytes()[:-50])
    with pytest.raises(ArtefactError, match=r"00001\.npy has .* run again"):
        Residuals(run, "train").chunk(0)


def test_other_settings_have_other_caches(make_run: Any) -> None:
    base = Residuals(make_run(), "train").inputs
    for key, value in {
        "model__layer": 3, "model__dtype": "bfloat16", "model__weights": "processed",
        "text__seed": 1, "text__skip_first": False, "activations__chunk_rows": 8,
    }.items():  # fmt: skip
        assert Residuals(make_run(**{key: value}), "train").inputs != base
    assert Residuals(make_run(training__seeds=[5]), "train").inputs == base


@pytest.mark.parametrize("cache", [True, False])
def test_batches_are_shuffled_passes(make_run: Any, cache: bool) -> None:
    """Read in sequence: every pass holds every token once, chunk after chunk."""
    run = make_run(activations__cache=cache)
    stream = BatchStream(run)
    chunks = list(Residuals(run, "train"))
    assert [len(chunk) for chunk in chunks] == [105] * 5 + [75]
    read = torch.cat([stream.batch(step) for step in range(20)])
    assert read.shape == (1280, 32) and read.dtype == torch.float32

    def in_order(rows: Tensor) -> np.ndarray:
        values = rows.numpy()
        return values[np.lexsort(values.T)]

    orders = []
    for start in (0, 600):
        offset = start
        for chunk in chunks:
            part = read[offset : offset + len(chunk)]
            assert not torch.equal(part, chunk)
            np.testing.assert_array_equal(in_order(part), in_order(chunk))
            offset += len(chunk)
        orders.append(read[start : start + 105])
    assert not torch.equal(*orders)  # another order in another pass


def test_a_batch_depends_on_the_seed_and_the_step_alone(make_run: Any) -> None:
    run = make_run()
    stream = BatchStream(run)
    ahead = [stream.batch(step) for step in range(20)]
    for step in (19, 3, 9, 10, 0):
        assert torch.equal(BatchStream(run).batch(step), ahead[step])  # resumed
        assert torch.equal(stream.batch(step), ahead[step])  # gone back
    assert not torch.equal(BatchStream(run).batch(0, order=1), ahead[0])
    longer = make_run(training__train_tokens=1280)
    assert torch.equal(BatchStream(longer).batch(9), ahead[9])


def test_reading_in_sequence_computes_each_chunk_once(make_run: Any, monkeypatch: Any) -> None:
    run = make_run(activations__cache=False)
    computed: list[int] = []
    original = Residuals._compute

    def counting(self: Residuals, index: int, *part: slice) -> Tensor:
        computed.append(index)
        return original(self, index, *part)

    monkeypatch.setattr(Residuals, "_compute", counting)
    stream = BatchStream(run)
    for step in range(18):  # 1,152 tokens: one pass of 600, and most of another
        stream.batch(step)
    assert computed == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
