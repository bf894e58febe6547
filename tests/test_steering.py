"""Steering against the change written out by hand, and against Hugging Face's own probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, save_model, save_text, small_profile
from transformers import AutoModelForCausalLM

from metasae_lib.interpret.steering import next_tokens, scaled
from metasae_lib.subject.model import Subject, load_subject
from metasae_lib.train.dictionary import BatchTopK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    save_text(root / "text.jsonl")
    save_model("llama", root / "llama")
    return root / "llama"


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(small_profile(folder, folder.parent / "text.jsonl"))


@pytest.fixture
def sae() -> BatchTopK:
    sae = BatchTopK(32, 16, 4, seed=1)
    sae.threshold = torch.full((16,), 0.1)
    return sae


def test_a_feature_is_scaled_where_it_fires_and_nowhere_else(sae: BatchTopK) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for factor in (0.0, 1.0, 2.5):
        steered = scaled(sae, 3, factor)(x)
        for row, column in np.ndindex(2, 5):
            token = x[row, column].double()
            std = token.std() + 1e-5
            z = (token - token.mean()) / std
            act = float(z @ sae.W_enc[:, 3].double())
            act = act if act > 0.1 else 0.0
            by_hand = token + (factor - 1) * act * sae.W_dec[3].double() * std
            torch.testing.assert_close(steered[row, column].double(), by_hand, atol=1e-5, rtol=0)


def test_positions_before_the_first_stay_as_they_are(sae: BatchTopK) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    every, later = scaled(sae, 3, 5.0)(x), scaled(sae, 3, 5.0, 1)(x)
    assert torch.equal(later[:, 0], x[:, 0]) and torch.equal(later[:, 1:], every[:, 1:])
    assert not torch.equal(every[:, 0], x[:, 0])


def test_removing_a_feature_removes_it(sae: BatchTopK) -> None:
    """Orthogonal rows, so that taking one out leaves the others and it alone is gone."""
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    sae.W_dec.data, sae.W_enc.data = q[:16], q[:16].T
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(2))
    fires = sae.encode_threshold(((x - x.mean(-1, True)) / x.std(-1, keepdim=True))[0])[:, 3] > 0
    x = scaled(sae, 3, 0.0)(x)
    left = (x - x.mean(-1, keepdim=True)) @ q[3]
    assert fires.any() and (left[0, fires].abs() < 0.2).all()


def test_probabilities_are_the_models_own(subject: Subject, folder: Path, sae: BatchTopK) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 12))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids[None]).logits[0, -1]
    torch.testing.assert_close(subject.next_logits(ids[None])[0], expected, atol=1e-4, rtol=1e-4)
    same, removed = scaled(sae, 3, 1.0), lambda x: torch.zeros_like(x)
    frame = next_tokens(subject, ids, {"same": same, "gone": removed}, str, n_top=3)
    p = expected.softmax(-1)
    assert frame.token[0] == str(int(p.argmax()))
    np.testing.assert_allclose(frame.unchanged[0], float(p.max()), atol=1e-5)
    np.testing.assert_allclose(frame["change same"], 0, atol=1e-4)
    assert frame["change gone"].abs().max() > 1e-3
    assert 3 <= len(frame) <= 9
