"""The logit lens against transformers' own norm and head, in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, save_model, save_text, small_profile
from transformers import AutoModelForCausalLM

from metasae_lib import Run
from metasae_lib.interpret import lens, logit_lens
from metasae_lib.subject.head import BLOCK_BYTES
from metasae_lib.subject.model import load_subject
from metasae_lib.train.dictionary import BatchTopK

ARCHITECTURES = ("llama", "gpt2", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    save_text(root / "text.jsonl")
    for architecture in ARCHITECTURES:
        save_model(architecture, root / architecture)
    return root


def by_hand(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """The rows through the final norm and the head, less what these make of zero; centred."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    rows = rows.double() / rows.double().norm(dim=1, keepdim=True) * rows.shape[1] ** 0.5
    with torch.no_grad():
        logits = model.lm_head(norm(rows)) - model.lm_head(norm(torch.zeros_like(rows)))
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("weights", ["as_trained", "processed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_models_own_norm_and_head(
    root: Path, architecture: str, weights: str
) -> None:
    profile = small_profile(root / architecture, root / "text.jsonl", model__weights=weights)
    rows = 3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    (logits,) = load_subject(profile).direct_logits(rows)
    expected = by_hand(root / architecture, rows)
    # Folding may shift all logits of a token together, which no probability sees.
    centred = logits.double() - logits.double().mean(1, keepdim=True)
    torch.testing.assert_close(centred, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_memory_is_bounded_by_blocks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(small_profile(root / "llama", root / "text.jsonl"))
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    (whole,) = subject.direct_logits(rows)
    monkeypatch.setattr("metasae_lib.subject.head.BLOCK_BYTES", 7 * 4 * VOCABULARY)
    parts = list(subject.direct_logits(rows))
    assert [len(part) for part in parts] == [7, 7, 6] and BLOCK_BYTES > 7 * 4 * VOCABULARY
    torch.testing.assert_close(torch.cat(parts), whole)


def test_both_ends_are_kept_by_name_and_made_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(small_profile(root / "gpt2", root / "text.jsonl"), tmp_path)
    sae = BatchTopK(32, 50, 4, seed=1)
    arms = {"solo": SimpleNamespace(sae=sae, folder=Path("arm-1"))}
    found = logit_lens(run, arms)["solo"]  # type: ignore[arg-type]
    logits = by_hand(root / "gpt2", sae.W_dec)
    assert found.names.shape == found.values.shape == (50, 2, lens.COUNT)
    order, tokenizer = logits.argsort(1, descending=True), lens.load_tokenizer(run.profile)
    for end, ids in enumerate((order[:, : lens.COUNT], order.flip(1)[:, : lens.COUNT])):
        np.testing.assert_allclose(found.values[:, end], logits.gather(1, ids), atol=2e-4)
        for feature, token in enumerate(ids[:, 0].tolist()):
            name, value = found.of(feature)[end][0]
            assert name == tokenizer.decode([token])
            assert value == pytest.approx(float(logits[feature, token]), abs=2e-4)

    monkeypatch.setattr(lens, "subject_of", lambda run: pytest.fail("made twice"))
    again = logit_lens(run, arms)["solo"]  # type: ignore[arg-type]
    assert (again.names == found.names).all() and (again.values == found.values).all()


def test_padding_of_the_vocabulary_is_no_token(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(small_profile(root / "llama", root / "text.jsonl"), tmp_path)
    tokenizer = lens.load_tokenizer(run.profile)
    arms = {"solo": SimpleNamespace(sae=BatchTopK(32, 50, 4), folder=Path("arm-1"))}
    logits = torch.zeros(50, len(tokenizer) + 9)
    logits[:, 3], logits[:, 4], logits[:, -1], logits[:, -2] = 1, -1, 5, -5
    subject = SimpleNamespace(direct_logits=lambda rows: [logits])
    monkeypatch.setattr(lens, "subject_of", lambda run: subject)
    promoted, suppressed = logit_lens(run, arms)["solo"].of(0)  # type: ignore[arg-type]
    assert promoted[0][1] == 1 and suppressed[0][1] == -1
