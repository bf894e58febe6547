"""Sparse probes: planted labels, shuffled ones, and which rows may choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from metasae_lib import Run
from metasae_lib.measure.probes import choose, dense_probe, sparse_probe
from metasae_lib.subject import labelled, load_tokenizer


def world(n: int = 200, m: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Sparse activations (m, n) that know nothing of the labels, which take turns."""
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(m, n)) * (rng.random((m, n)) < 0.1)
    return x.astype(np.float32), np.tile([0, 1], m // 2)


@pytest.mark.parametrize("carrier", [0, 1])
def test_a_feature_that_carries_the_label_tells_all(carrier: int) -> None:
    """Present on either class; it is found among larger ones, which know nothing."""
    x, y = world()
    x[:, :50] *= 100
    x[:, 123] = 0.5 * (y == carrier)
    assert sparse_probe(x, y, 1) == (1, 1)
    assert choose(x, y, 1).tolist() == [123]
    assert sparse_probe(x, y, 5)[0] > 0.99
    assert dense_probe(x[:, 100:], y)[0] > 0.9


def test_shuffled_labels_give_chance() -> None:
    x, y = world(m=4000)
    y = np.random.default_rng(1).permutation(y)
    low, high = stats.binom.ppf([0.0005, 0.9995], 2000, 0.5) / 2000
    for k in (1, 5):
        auc, accuracy = sparse_probe(x, y, k)
        assert low < accuracy < high and abs(auc - 0.5) < 0.06


def test_features_are_chosen_without_the_rows_that_judge() -> None:
    """A feature that knows every held-out label and no other must not be taken."""
    x, y = world()
    half = len(x) // 2
    x[half:, 7] = 5 * y[half:]
    auc, accuracy = sparse_probe(x, y, 1)
    assert auc < 0.7 and accuracy < 0.7
    x[:half, 7] = 5 * y[:half]
    assert sparse_probe(x, y, 1) == (1, 1)


def test_choice_by_hand() -> None:
    """Columns: class means 1 and 0, 10 and 2, 0 and 1; mean sizes where not zero 2, 6 and 1."""
    x = np.array([[2, 10, 0], [0, 2, 1], [0, 10, 0], [0, 2, 1]], float)
    assert choose(x, np.array([0, 1, 0, 1]), 3).tolist() == [1, 2, 0]  # 8/6, 1/1, 1/2


def test_labelled_texts_are_balanced_and_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package of our own, in the format of the real one."""
    import pyarrow

    lines = ["prompt,target", *(f"text {i},{'yes' if i % 3 else 'no'}" for i in range(2400))]
    packed = pyarrow.compress("\n".join(lines).encode(), codec="zstd", asbytes=True)
    asked: list[str] = []

    def files(path: Any, pattern: str) -> list[bytes]:
        asked.append(pattern)
        return [packed]

    monkeypatch.setattr(labelled, "wheel", lambda package: package)
    monkeypatch.setattr(labelled, "wheel_files", files)
    found = labelled.labelled_texts()
    assert list(found) == list(labelled.TASKS) and len(asked) == len(found)
    texts, labels = found["87_glue_cola"]
    assert len(set(texts)) == len(texts) == len(labels) == labelled.TEXTS
    assert all((int(t.split()[1]) % 3 > 0) == bool(y) for t, y in zip(texts, labels, strict=True))
    assert labels[:300].sum() == labels[300:].sum() == 150
    assert labelled.labelled_texts()["87_glue_cola"][0] == texts


def test_residuals_are_those_of_the_last_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts keep their end, filling changes nothing, and rows come back in order."""
    tokenizer = load_tokenizer(run.profile)
    texts = [" word" * i for i in (3, 300, 1, 40, 2)] + ["a man"]
    monkeypatch.setattr(labelled, "labelled_texts", lambda: {"x": (texts, np.zeros(6, int))})
    monkeypatch.setattr(labelled, "labelled_inputs", lambda run: {"of": "the test"})

    def residuals(rows: np.ndarray) -> torch.Tensor:
        """Of each place: all tokens up to it, as a causal model has it; and how many."""
        ids = torch.from_numpy(rows).double()
        assert ids.shape[0] * ids.shape[1] <= 16 * 128 or len(ids) == 1
        return torch.stack([ids.cumsum(1), torch.ones_like(ids).cumsum(1)], dim=-1)

    monkeypatch.setattr(labelled, "subject_of", lambda run: SimpleNamespace(residuals=residuals))
    found = labelled.labelled_residuals(run)
    for text, (total, length) in zip(texts, found.tolist(), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][-127:]
        assert length == len(ids) + 1 and total == sum(ids) + tokenizer.bos_token_id
