"""A judge in this process: a sentence encoder, by how near a text comes to an explanation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metasae_lib.interpret.judges.questions import JudgeError, Question, choice, one_line
from metasae_lib.subject import embedded
from metasae_lib.subject.model import load_weights

_BLOCK_QUESTIONS = 8192
_BATCH = 128  # texts
_KEPT_TOKENS = 250_000  # of texts that may come again: 400 MB
_SHARPNESS = 4  # of the bend at zero: what is ordinary counts for little, but tells texts apart
_LEAST_SCATTER = 0.01  # of a cosine over texts, where a token of the explanation meets none of them


class EmbeddingJudge:
    """A sentence encoder, asked how near the tokens of a text come to those of an explanation.

    s(q, d) is the cosine of the encoder's vectors of token q of the explanation and token d of the
    text, or 1 where both are the same word piece, which lets it see words of form ("of", "would")
    beside words of meaning. m_q and σ_q are the mean and deviation of max_d s(q, d) over
    `background`, texts of the corpus as they come: so a token that is near any text counts for
    little. The evidence for a text is

        Σ_d log(1 + exp(4 max_q (s(q, d) - m_q) / σ_q)),

    in standard deviations of the same sum over the background, less one. Fuzzing: the text with
    more evidence. Detection: evidence above 0, a deviation above ordinary text. Strength: evidence
    through a rising curve. This is late interaction as in ColBERT (arXiv 2004.12832), with exact
    matches and calibration added; chosen on planted concepts of meaning and of form.

    It reads explanations and writes none. source: as `model.source` of a profile; the model's last
    hidden states are the vectors. Raises JudgeError where it is asked to explain.
    """

    def __init__(self, source: str, background: Sequence[str]) -> None:
        self._source, self._texts = source, [one_line(text) for text in background]
        texts = hashlib.sha256("\n".join(self._texts).encode()).hexdigest()
        self.identity = {
            "judge": "embedding", "model": embedded.identity(source), "background": texts,
            "version": 2,
        }  # fmt: skip
        self._known: dict[str, _Tokens] = {}
        self._kept = 0

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers block by block, so that a killed run keeps what it had."""
        if any(question.task == "explain" for question in questions):
            raise JudgeError(
                "the embedding judge writes no explanations: set autointerp.explainer to lexical "
                "or to a language model"
            )
        for start in range(0, len(questions), _BLOCK_QUESTIONS):
            block = questions[start : start + _BLOCK_QUESTIONS]
            lines = [[one_line(example.text) for example in q.examples] for q in block]
            asked: dict[str, dict[str, float]] = {}
            for question, texts in zip(block, lines, strict=True):
                asked.setdefault(question.explanation, {}).update(dict.fromkeys(texts, 0.0))
            tokens = self._encode([*asked, *(text for mine in asked.values() for text in mine)])
            for explanation, mine in asked.items():
                texts_of = _joined([tokens[text] for text in mine])
                evidence = self._evidence(tokens[explanation], texts_of)
                mine.update(zip(mine, evidence.round(3).tolist(), strict=True))
            for k, (question, texts) in enumerate(zip(block, lines, strict=True)):
                values = [asked[question.explanation][text] for text in texts]
                yield start + k, choice(question.task, values)

    @cached_property
    def model(self) -> Any:
        """The encoder, loaded on first use, on a GPU where there is one."""
        model = load_weights(embedded.snapshot(self._source), torch.bfloat16, encoder=True)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded.snapshot(self._source))

    @cached_property
    def _background(self) -> _Texts:
        tokens = self._encode(self._texts)
        return _joined([tokens[text] for text in self._texts])

    def _evidence(self, explanation: _Tokens, texts: _Texts) -> NDArray[np.float64]:
        """What each text shows of an explanation, (texts,)."""
        if not len(explanation.ids):
            return np.zeros(len(texts.starts))
        background = self._background
        usual = _nearness(explanation, background)
        nearest = np.maximum.reduceat(usual, background.starts, axis=1)
        middle, scatter = nearest.mean(axis=1), np.maximum(nearest.std(axis=1), _LEAST_SCATTER)

        def shown(near: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float64]:
            best = ((near - middle[:, None]) / scatter[:, None]).max(axis=0)
            return np.add.reduceat(np.logaddexp(0, _SHARPNESS * best), starts)

        ordinary = shown(usual, background.starts)
        mine = shown(_nearness(explanation, texts), texts.starts)
        return (mine - ordinary.mean()) / ordinary.std() - 1

    def _encode(self, texts: Sequence[str]) -> dict[str, _Tokens]:
        """Word pieces of every text with their vectors, without the encoder's marks around them."""
        if self._kept > _KEPT_TOKENS:
            self._known.clear()
            self._kept = 0
        found = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        lists = self.tokenizer(new, truncation=True)["input_ids"] if new else []
        for text, ids in zip(new, lists, strict=True):
            by_length.setdefault(-(-len(ids) // 8) * 8, []).append((text, ids))
        for length, rows in by_length.items():
            for start in range(0, len(rows), _BATCH):
                found |= self._vectors(rows[start : start + _BATCH], length)
        self._known |= found
        self._kept += sum(len(found[text].ids) for text in new)
        return found

    def _vectors(self, rows: Sequence[tuple[str, list[int]]], length: int) -> dict[str, _Tokens]:
        """One batch. In bfloat16 a product's last bits depend on its shape, so that is a function
        of the text's length alone, and an answer does not depend on what is asked beside it."""
        lists = [ids for _, ids in rows] + [rows[0][1]] * (_BATCH - len(rows))
        given = self.tokenizer.pad(
            {"input_ids": lists}, padding="max_length", max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = self.model(**given.to(self.model.device)).last_hidden_state
        vectors = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu().numpy()
        special, found = set(self.tokenizer.all_special_ids), {}
        for (text, ids), row in zip(rows, vectors, strict=False):
            kept = [place for place, token in enumerate(ids) if token not in special]
            found[text] = _Tokens(np.array([ids[place] for place in kept], int), row[kept])
        return found


class _Tokens(NamedTuple):
    """Word pieces (t,) and their vectors (t, d) of unit length."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]


class _Texts(NamedTuple):
    """The tokens of several texts after one another, and where each text starts."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    starts: NDArray[np.int64]


def _joined(texts: Sequence[_Tokens]) -> _Texts:
    # A text without a single word piece stands as one that is like nothing.
    nothing = _Tokens(np.array([-1]), np.zeros((1, texts[0].vectors.shape[1]), np.float32))
    full = [text if len(text.ids) else nothing for text in texts]
    starts = np.cumsum([0, *(len(text.ids) for text in full[:-1])])
    ids, vectors = (np.concatenate(parts) for parts in zip(*full, strict=True))
    return _Texts(ids, vectors, starts)


def _nearness(explanation: _Tokens, texts: _Texts) -> NDArray[np.float32]:
    """s(q, d) of every token of an explanation and every token of the texts."""
    near: NDArray[np.float32] = explanation.vectors @ texts.vectors.T
    near[explanation.ids[:, None] == texts.ids] = 1
    return near
