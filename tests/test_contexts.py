"""Contexts against a brute-force pass over the same activations; exact text of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metasae_lib import Profile, Run
from metasae_lib.interpret import contexts
from metasae_lib.interpret import material as materials
from metasae_lib.interpret.contexts import Contexts, collect_contexts
from metasae_lib.interpret.examples import Layout, Pieces
from metasae_lib.interpret.senses import places_of
from metasae_lib.measure import scan
from metasae_lib.study.errors import MeasureError
from metasae_lib.train.dictionary import BatchTopK, normalise

N_ROWS, LENGTH, D, N, WINDOW = 150, 20, 16, 24, 6
TEXT = ["Größe, naïve café — 日本語のテキスト", "plain words and 100 numbers", "emoji 👩‍🚀🙂 here"]


def byte_level(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")


TOKENIZER = byte_level()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_joined_are_the_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(TOKENIZER)(ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)


def test_a_character_of_several_tokens_stands_at_the_first() -> None:
    ids = TOKENIZER("a龘b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # three bytes that were never merged
    assert Pieces(TOKENIZER)(ids) == ("a", "龘", "", "", "b")
    assert Pieces(TOKENIZER)(ids[:3]) == ("a", "�", "�")  # cut off at the edge
    assert Pieces(TOKENIZER)([0, *ids[:1]]) == ("", "a")  # a special token is no text


def test_pieces_of_sentencepiece_tokens() -> None:
    vocabulary = {"<bos>": 0, "▁the": 1, "<0xC3>": 2, "<0xA9>": 3, "n": 4, "é": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    assert Pieces(wrapped)([0, 1, 2, 3, 4, 5]) == ("", " the", "é", "", "n", "é")


def test_pieces_of_words_keep_their_spaces() -> None:
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "sat": 4}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    whole = Tokenizer(models.WordLevel(vocabulary | {"cats": 5}, "[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe = Tokenizer(models.BPE({"the</w>": 0, "cat": 1, "s</w>": 2, "sat</w>": 3}, []))
    bpe.decoder = decoders.BPEDecoder()
    for tokenizer, ids in ((pieces, [1, 2, 3, 4]), (whole, [1, 5, 4]), (bpe, [0, 1, 2, 3])):
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
        assert "".join(Pieces(wrapped)(ids)).strip() == "the cats sat"


def test_layout_gives_every_segment_one_number() -> None:
    layout = Layout(n_rows=7, context_length=20, chunk_rows=3, window=6)
    places = [layout.place(int(s)) for s in layout.segments()]
    assert places == [(row, start) for row in range(7) for start in (0, 6, 12)]
    assert len(set(layout.segments())) == 21
    assert layout.segments().max() < 8 * layout.chunk_bytes * layout.n_chunks


def fires_in(found: Contexts, feature: int, segment: int) -> bool:
    """Whether the feature's bit of a segment is set."""
    return bool(np.unpackbits(found._fired[feature])[segment])


class Stage:
    """A run whose text and residuals are random, with one arm whose thresholds let 5% fire."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = np.random.default_rng(0)
        self.rows = generator.integers(1, 250, size=(N_ROWS, LENGTH)).astype(np.int32)
        self.rows[:, 0] = 0
        x = torch.randn(N_ROWS * (LENGTH - 1), D, generator=torch.Generator().manual_seed(0))
        self.sae = BatchTopK(D, N, 2)
        self.pre = self.sae.pre_activations(normalise(x)[0])
        # Feature 0 never fires, feature 1 nearly always.
        quantiles = torch.tensor([2.0, 0.6] + [0.95] * (N - 2)).clamp(max=1)
        self.sae.threshold = torch.stack(
            [self.pre[:, f].quantile(q) for f, q in enumerate(quantiles)]
        )
        self.sae.threshold[0] = torch.inf
        self.arm: Any = SimpleNamespace(sae=self.sae, folder=Path("arm"))
        self.chunks_read: list[int] = []
        self.stop_at: int | None = None
        stage = self

        class Residuals:
            def __init__(self, run: Run, role: str) -> None:
                self.inputs = {"role": role}
                self.n_tokens = len(x)
                self.chunk_rows = run.profile.activations.chunk_rows
                self.n_chunks = -(-N_ROWS // self.chunk_rows)

            def chunk(self, index: int) -> Tensor:
                if index == stage.stop_at:
                    raise KeyboardInterrupt
                stage.chunks_read.append(index)
                size = self.chunk_rows * (LENGTH - 1)
                return x[index * size : (index + 1) * size]

        tokens = SimpleNamespace(
            rows=lambda role: stage.rows,
            tokenizer=TOKENIZER,
            sources=lambda role, row, start, stop: (f"{role} {row} {start} {stop}",),
        )
        monkeypatch.setattr(contexts, "Residuals", Residuals)
        monkeypatch.setattr(scan, "Residuals", Residuals)
        monkeypatch.setattr(contexts, "load_tokens", lambda run: tokens)
        monkeypatch.setattr(contexts, "calibrate_arms", lambda run, arms: None)
        monkeypatch.setattr(contexts, "_PART_TOKENS", 7 * (LENGTH - 1))
        self.run = run

    def collect(self, keep: int = 10, seed: int = 0) -> Contexts:
        return collect_contexts(self.run, {"arm": self.arm}, WINDOW, keep, seed)["arm"]

    def firing(self) -> np.ndarray:
        """(rows, columns, n) activations above the thresholds, by brute force."""
        assert self.sae.threshold is not None
        acts = torch.where(self.pre > self.sae.threshold, self.pre, 0)
        whole = np.zeros((N_ROWS, LENGTH, N), np.float32)
        whole[:, 1:] = acts.view(N_ROWS, LENGTH - 1, N).numpy()
        return whole


def profile(**changes: Any) -> Profile:
    overrides = {
        "text.context_length": LENGTH, "autointerp.window": WINDOW, "training.dtype": "float32",
        "activations.chunk_rows": 32,
    }  # fmt: skip
    return Profile.load("tiny", overrides | changes)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    yield Stage(Run.open(profile(), tmp_path / "runs"), monkeypatch)


def test_bits_counts_and_activations_equal_brute_force(stage: Stage) -> None:
    found, firing = stage.collect(), stage.firing()
    layout = found.layout
    for feature in range(N):
        n_firing = 0
        for segment in layout.segments():
            row, start = layout.place(int(segment))
            fires = bool((firing[row, start : start + WINDOW, feature] > 0).any())
            assert fires_in(found, feature, int(segment)) == fires
            n_firing += fires
        assert found.n_firing[feature] == n_firing
        examples = found.examples(feature)
        assert len(examples) == min(10, n_firing)
        assert len({e.segment for e in examples}) == len(examples)
        for example in examples:
            row, start = layout.place(example.segment)
            assert example.ids == tuple(stage.rows[row, start : start + WINDOW])
            window = firing[row, start : start + WINDOW, feature]
            assert example.acts == pytest.approx(window.tolist(), rel=1e-5)
            assert example.acts[example.peak] == example.strength > 0


def test_places_of_a_feature_are_its_peaks(stage: Stage) -> None:
    found, firing = stage.collect(), stage.firing()
    for feature in range(N):
        places = places_of(found, feature)
        assert len(places) == len(found.examples(feature))
        for place, example in zip(places, found.examples(feature), strict=True):
            strength = firing[place.row, place.position, feature]
            assert strength == pytest.approx(example.strength) and strength > 0
            assert f"{place.before}{place.word}{place.after}" == example.text
            row, start = found.layout.place(example.segment)
            assert place.origin == f"contexts {row} {start} {start + WINDOW}"
            assert example.pieces[example.peak].lstrip() == place.word


def test_the_sample_is_uniform(stage: Stage) -> None:
    hits = np.zeros(8 * 8 * 32)
    for seed in range(12):
        found = stage.collect(keep=10, seed=seed)
        for e in found.examples(1):
            hits[e.segment] += 1
    segments = found.layout.segments()
    expected = 12 * 10 / found.n_firing[1]
    assert hits[segments].std() == pytest.approx(np.sqrt(expected), rel=0.25)
    first, second = np.array_split(hits[segments], 2)
    assert abs(first.sum() - second.sum()) < 4 * np.sqrt(120)


def test_the_result_does_not_depend_on_the_cut(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.collect()
    monkeypatch.setattr(contexts, "_PART_TOKENS", 1)
    stage.run = Run.open(profile(), tmp_path / "other")
    again = stage.collect()
    assert [again.examples(f) for f in range(N)] == [whole.examples(f) for f in range(N)]


def test_a_killed_pass_goes_on_to_the_same_result(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.collect()
    monkeypatch.setattr(contexts, "_CHECKPOINT_SECONDS", -1)
    stage.run = Run.open(profile(), tmp_path / "killed")
    for stop_at in (2, 4):
        stage.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            stage.collect()
    stage.stop_at, stage.chunks_read = None, []
    again = stage.collect()
    assert stage.chunks_read == [4]
    assert [again.examples(f) for f in range(N)] == [whole.examples(f) for f in range(N)]
    assert (again.n_firing == whole.n_firing).all()
    assert [again.non_activating(f, 9) for f in range(N)] == [
        whole.non_activating(f, 9) for f in range(N)
    ]
    stage.chunks_read = []
    stage.collect()
    assert stage.chunks_read == []  # cached


def test_split_is_disjoint_and_covers_the_quantiles(stage: Stage) -> None:
    found = stage.collect(keep=40)
    feature = int(found.usable(40, 5)[-1])
    explain, score = found.split(feature, 10, 5)
    assert not {e.segment for e in explain} & {e.segment for e in score}
    strengths = sorted(e.strength for e in found.examples(feature))
    quintiles = [set(part) for part in np.array_split(np.array(strengths, np.float32), 5)]
    assert all(np.float32(e.strength) in q for e, q in zip(score, quintiles, strict=True))
    assert all(np.float32(explain[k].strength) in quintiles[k // 2] for k in range(10))
    assert found.top(feature, 3)[0].strength == strengths[-1]
    with pytest.raises(MeasureError, match="multiples of 5"):
        found.split(feature, 7, 5)
    with pytest.raises(MeasureError, match="has 0 examples"):
        found.split(0, 10, 5)


@pytest.mark.parametrize("kind", ["random", "token", "cooccurrence"])
def test_non_activating_examples_do_not_fire(stage: Stage, kind: Any) -> None:
    found = stage.collect()
    firing = stage.firing()
    for feature in range(0, N, 3):
        silent = found.non_activating(feature, 12, kind)
        assert len(silent) == 12 and len({e.segment for e in silent}) == 12
        for example in silent:
            row, start = found.layout.place(example.segment)
            assert not firing[row, start : start + WINDOW, feature].any()
    if kind == "token":
        feature = 5
        peaks = [e.ids[e.peak] for e in found.examples(feature)]
        token = min(peaks, key=lambda t: (-peaks.count(t), t))
        near = [token in e.ids for e in found.non_activating(feature, 400, kind)]
        assert near[0] and near == sorted(near, reverse=True)
    if kind == "cooccurrence":
        fires = np.array([[fires_in(found, f, int(s)) for s in found.layout.segments()]
                          for f in range(N)])  # fmt: skip
        shared = (fires & fires[5]).sum(axis=1)
        shared[5] = -1
        partner = int(shared.argmax())
        near = [fires_in(found, partner, e.segment) for e in found.non_activating(5, 400, kind)]
        assert near[0] and near == sorted(near, reverse=True)
        assert sum(near) == (fires[partner] & ~fires[5]).sum()


def test_every_feature_is_in_the_table(stage: Stage) -> None:
    table = stage.collect().table(examples=10, silent=40)
    assert list(table.feature) == list(range(N))
    assert table.verdict[0] == "dead" and table.verdict[1] == "fires too often"
    few = stage.collect().table(examples=11, silent=5)  # more than are kept
    assert set(few.verdict[2:]) == {"fires too often"} or "enough" not in set(few.verdict)


def test_segments_with_words(stage: Stage) -> None:
    stage.rows[30:33, 2:4] = stage.rows[3, 4]  # two of them in one segment
    word = Pieces(TOKENIZER)([int(stage.rows[3, 4])])[0]
    firing, silent = stage.collect().with_words([word.strip().upper()], 20)
    assert firing and len(silent) == len(firing)
    for example in firing:
        holds = [
            "".join(Pieces(TOKENIZER)([i])).strip().lower() == word.strip().lower()
            for i in example.ids
        ]
        assert list(example.acts) == [sum(holds) * one for one in holds]
    assert all(example.strength == 0 for example in silent)
    assert {example.strength for example in firing[:2]} == {1, 2}  # both strengths come first


def test_a_pass_killed_within_a_chunk_goes_on_to_the_same_result(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.collect()
    stage.run = Run.open(profile(), tmp_path / "killed")
    real = contexts._Collector.add

    def add(self: Any, chunk: int, first_row: int, *rest: Any) -> None:
        real(self, chunk, first_row, *rest)
        if (chunk, first_row) == (3, 14):
            raise KeyboardInterrupt  # bits of half a chunk are on disk by now

    with monkeypatch.context() as patch:
        patch.setattr(contexts, "_CHECKPOINT_SECONDS", -1)
        patch.setattr(contexts._Collector, "add", add)
        with pytest.raises(KeyboardInterrupt):
            stage.collect()
    stage.chunks_read = []
    again = stage.collect()
    assert stage.chunks_read == [3, 4]
    assert (again.n_firing == whole.n_firing).all()
    for f in range(N):
        assert again.examples(f) == whole.examples(f)
        assert again.non_activating(f, 9) == whole.non_activating(f, 9)


def test_a_window_that_does_not_fit_is_refused(stage: Stage) -> None:
    with pytest.raises(MeasureError, match="does not fit rows of 20"):
        collect_contexts(stage.run, {"arm": stage.arm}, window=21)


def test_material_of_collected_features(stage: Stage) -> None:
    found = stage.collect(keep=40)
    sampling = materials.Sampling(explain=10, score=5, rounds=4)
    features = found.usable(sampling.examples, sampling.examples)[:4]
    for material in materials.materials(found, features, sampling):
        examples = [*material.explain.examples, *material.examples]
        assert len({e.segment for e in examples}) == 15
        assert all(fires_in(found, material.feature, e.segment) for e in examples)
        silent = [*material.silent, *material.explain.against]
        assert len({e.segment for e in silent}) == 15
        assert not any(fires_in(found, material.feature, e.segment) for e in silent)
    with pytest.raises(MeasureError, match="fires almost everywhere"):
        materials.materials(found, [1], materials.Sampling(explain=10, score=30))


def test_planted_features_fire_on_their_words(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stage.collect()
    words = tuple({Pieces(TOKENIZER)([int(i)])[0].strip() for i in stage.rows[0]} - {"", "�"})
    concepts = {"some words": words, "no words": ("qqqq",)}
    monkeypatch.setattr(materials, "PLANTED", {"meaning": concepts})
    made = materials.planted(found, materials.Sampling(), copies=2)
    assert [one.concepts for one in made] == [("some words",)] * 2
    used = [
        e.segment for one in made for e in (*one.material.explain.examples, *one.material.examples)
    ]
    assert len(set(used)) == 30
    assert all(e.strength == 0 for one in made for e in one.material.silent)


def test_a_blend_is_half_of_either_concept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stage.collect()
    pieces = Pieces(TOKENIZER)
    words = sorted({pieces([int(i)])[0].strip().lower() for i in stage.rows[0]} - {"", "�"})
    halves = {"first": tuple(words[::2]), "none": ("qqqq",), "second": tuple(words[1::2])}
    monkeypatch.setattr(materials, "PLANTED", {"meaning": halves | {"none too": ("qqqq",)}})
    made = materials.planted(found, materials.Sampling(explain=5, score=5), 1, blends=True)
    assert [one.concepts for one in made] == [("first", "second"), ("second", "first")]
    for one in made:
        examples = (*one.material.explain.examples, *one.material.examples)
        assert len({example.segment for example in examples}) == 10
        # An example fires on words of one concept alone; five are of each.
        kinds = [
            {name for name in ("first", "second")
             if any(pieces([i])[0].strip().lower() in halves[name]
                    for i, act in zip(e.ids, e.acts, strict=True) if act)}
            for e in examples
        ]  # fmt: skip
        assert sorted(map(sorted, kinds)) == [["first"]] * 5 + [["second"]] * 5
        for example in one.material.silent:
            assert not {pieces([i])[0].strip().lower() for i in example.ids} & set(words)
