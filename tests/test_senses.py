"""Words, their proxies and the information that features hold: against counting by hand."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from metasae_lib.interpret import senses
from metasae_lib.interpret.senses import (
    WORDS,
    Occurrence,
    belongs,
    bootstrap_difference,
    case_study,
    firing_at,
    label,
    mutual_information,
    occurrences,
    quoted,
    sense_information,
    side_by_side,
    split_sentence,
)
from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK


def shared_bits(x: np.ndarray, y: np.ndarray) -> float:
    """H(x) + H(y) - H(x, y) in bits: another way to the same number."""

    def entropy(values: np.ndarray) -> float:
        return float(stats.entropy(np.unique(values, return_counts=True)[1], base=2))

    return entropy(x) + entropy(y) - entropy(10 * x.astype(int) + y)


class WordTokenizer:
    """A stand-in: a token is a word with the blank before it, and long words are cut in two."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        found = [p for w in re.findall(r"\s?\w+|\s?[^\w\s]", text) for p in (w[:6], w[6:]) if p]
        self.pieces += [p for p in dict.fromkeys(found) if p not in self.pieces]
        return [self.pieces.index(p) for p in found]

    def decode(self, ids: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


def rows_of(tokenizer: WordTokenizer, *texts: str) -> np.ndarray:
    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    filler = tokenizer.encode("\n.")[0]
    return np.array([row + [filler] * (width - len(row)) for row in ids])


def test_occurrences_are_whole_words_in_every_spelling() -> None:
    tokenizer = WordTokenizer()
    rows = rows_of(
        tokenizer,
        "It was too hot, me too. Too bad",
        "too at position zero is left out",
        "tootoo is another word, cookies are not",
    )
    found = occurrences(rows, tokenizer, "too")
    assert [(o.row, o.word) for o in found] == [(0, "too"), (0, "too"), (0, "Too")]
    assert found[0].before == " was " and found[0].after.startswith(" hot, me too.")
    (cookie,) = occurrences(rows, tokenizer, "cookies")  # two tokens: the last one counts
    assert tokenizer.decode(rows[2, cookie.position - 1 : cookie.position + 1]) == " cookies"


@pytest.mark.parametrize(
    ("word", "before", "after", "sense"),
    [
        ("too", "me ", ", he said", "also"),
        ("too", "me ", "", "also"),
        ("too", "it was ", " hot", "excess"),
        ("let", "", "'s go", "suggestion"),
        ("let", "now ", " me turn to", "suggestion"),
        ("let", "they ", " him go", "permission"),
        ("bank", "the West ", " settlement", "West Bank"),
        ("bank", "the World ", " said", "finance"),
        ("bank", "the southwest ", " said", None),
        ("order", "in ", " to win", "purpose"),
        ("order", "an executive ", " on trade", "command or peace"),
        ("kind", "she was ", " of tall", "sort"),
    ],
)
def test_proxies(word: str, before: str, after: str, sense: str | None) -> None:
    index = label(Occurrence(0, 1, before, word, after), WORDS[word])
    assert (WORDS[word][index].name if index >= 0 else None) == sense


def test_mutual_information_against_entropies() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    fires = rng.random((200, 5)) < np.where(y == 1, 0.7, 0.1)[:, None]
    fires[:, 4] = y == 2
    counts = np.stack([fires[y == c].sum(0) for c in range(3)])
    ours = mutual_information(counts, 200, np.bincount(y))
    theirs = [shared_bits(fires[:, i], y) for i in range(5)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_feature_that_knows_the_sense_holds_all_of_it() -> None:
    y = np.array([0] * 30 + [1] * 10)
    fires = np.zeros((40, 4))
    fires[:, 2] = y
    fires[::2, 1] = 3.5
    found = sense_information(sparse.csr_array(fires), y)
    assert found.feature == 2 and found.bits == pytest.approx(found.entropy)
    assert found.entropy == pytest.approx(0.8112781)  # -(0.75 log2 0.75 + 0.25 log2 0.25)
    assert found.share == pytest.approx(1) and found.p == pytest.approx(1 / 201)


def test_the_null_holds_the_maximum_over_all_features() -> None:
    """Noise features: the best of many looks informative, and its null says that it is not."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 60)
    fires = sparse.csr_array((rng.random((60, 400)) < 0.3).astype(float))
    found = sense_information(fires, y)
    assert found.bits > 0.1 and found.p > 0.05 and abs(found.share) < 0.1


def test_the_permutation_null_is_exact_on_a_small_case() -> None:
    y, fires = np.array([0, 0, 0, 1, 1]), np.array([[1], [1], [0], [0], [0]])
    values = []
    for chosen in itertools.combinations(range(5), 2):
        labels = np.isin(np.arange(5), chosen).astype(int)
        values.append(shared_bits(labels, fires[:, 0]))
    found = sense_information(sparse.csr_array(fires), y, permutations=4000)
    assert found.null_mean == pytest.approx(np.mean(values), abs=0.02)


def test_silent_features_and_bad_shapes() -> None:
    y = np.array([0, 1, 0, 1])
    found = sense_information(sparse.csr_array((4, 3)), y)
    assert found.bits == 0 and found.feature == -1 and found.p == 1
    with pytest.raises(MeasureError, match="give one sense an occurrence"):
        sense_information(sparse.csr_array((3, 3)), y)
    with pytest.raises(MeasureError, match="two kinds"):
        sense_information(sparse.csr_array((4, 3)), np.zeros(4, int))


def test_the_difference_of_two_dictionaries_has_an_interval() -> None:
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 200)
    knows = sparse.csr_array(y[:, None].astype(float))
    blends = sparse.csr_array(np.ones((200, 1)))
    low, high = bootstrap_difference(blends, knows, y, draws=50)
    assert 0.9 < low <= high <= 1
    assert bootstrap_difference(knows, knows, y, draws=20) == (0, 0)


def test_firing_is_read_at_the_right_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of two rows of three tokens; position 0 is skipped."""
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    class Stand:
        n_chunks = 2

        def __init__(self, run: Any, role: str) -> None: ...

        def chunk_tokens(self, index: int) -> int:
            return 4

        def chunk(self, index: int) -> torch.Tensor:
            return values[4 * index : 4 * index + 4]

    monkeypatch.setattr(senses, "Residuals", Stand)
    monkeypatch.setattr(senses, "product_dtype", lambda run: torch.float32)
    text = SimpleNamespace(context_length=3, kept_per_row=2)
    run = SimpleNamespace(profile=SimpleNamespace(text=text))
    sae = BatchTopK(6, 6, 2)
    sae.W_enc.data, sae.threshold = torch.eye(6), torch.full((6,), 0.5)
    found = [Occurrence(r, p, "", "", "") for r, p in ((3, 2), (0, 1), (2, 1))]
    acts = firing_at(run, {"a": SimpleNamespace(sae=sae)}, "scan", found)["a"]
    x = values[[7, 0, 4]]
    z = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    np.testing.assert_allclose(acts.toarray(), torch.where(z > 0.5, z, 0), rtol=1e-5)
    assert firing_at(run, {"a": SimpleNamespace(sae=sae)}, "scan", [])["a"].shape == (0, 6)


def study(solo: np.ndarray, joint: np.ndarray, places: np.ndarray, labels: np.ndarray) -> Any:
    cross, own = CooccurrenceCounter(solo.shape[1], joint.shape[1]), CooccurrenceCounter(2)
    cross.update(solo, joint)
    own.update(solo)
    at = (sparse.csr_array(fired[places].astype(float)) for fired in (solo, joint))
    return case_study(cross.cross_counts(), own.counts(), *at, labels, ["also", "excess"])


def test_a_word_that_splits_by_sense_is_found_and_one_that_does_not_is_not() -> None:
    """A word on tokens 0-99; solo feature 1 fires on all of them, joint 0 and 2 on the senses."""
    solo, joint = np.zeros((5000, 2), bool), np.zeros((5000, 4), bool)
    solo[:100, 1] = solo[1000:2000, 0] = True
    joint[:50, 0] = joint[50:100, 2] = joint[1000:1500, 3] = True
    places, labels = np.arange(100), np.repeat([0, 1], 50)
    table = study(solo, joint, places, labels)
    assert table.feature.tolist()[:3] == [1, 0, 2]
    by_hand = np.corrcoef(solo[:, 1], joint[:, 0])[0, 1]
    assert table.phi[1] == pytest.approx(by_hand) and table.phi_word[0] == pytest.approx(1)
    assert table.also.tolist()[:3] == [1, 1, 0] and table.sense.tolist()[:3] == [
        "",
        "also",
        "excess",
    ]
    assert "splits as in the paper" in split_sentence("too", table)
    blended = study(solo, solo[:, [1, 0, 0, 0]], places, labels)
    assert "does not split" in split_sentence("too", blended)
    assert "no joint partner" in split_sentence("too", blended)
    one_sense = study(solo & (np.arange(5000) < 50)[:, None], joint, places, labels)
    assert "already belongs to one sense, “also”" in split_sentence("too", one_sense)


def test_a_sense_needs_most_of_a_features_firing() -> None:
    assert belongs([0.8, 0.2], ["a", "b"]) == "a"
    assert belongs([0.7, 0.3], ["a", "b"]) == ""
    assert belongs([0.0, 0.0], ["a", "b"]) == ""


def test_contexts_stand_side_by_side_and_cannot_be_markup() -> None:
    found = [Occurrence(0, i, f"<script>`|*{i} ", "too", "\nnext") for i in range(4)]
    acts = {"solo 1": np.array([0.0, 2.0, 1.0, 0.0]), "joint 2": np.zeros(4)}
    table = side_by_side(found, np.array([0, 1, 1, -1]), ["also", "excess"], acts, per_sense=1)
    assert table.sense.tolist() == ["also", "excess"]
    assert table.context[1] == "`<script>ˋ|*1 «too» next`"
    assert table["solo 1"][1] == 2 and np.isnan(table["solo 1"][0])
    assert quoted("a\n\n b") == "`a b`"
