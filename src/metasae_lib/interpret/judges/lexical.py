"""A judge without a model: token statistics, the floor for every other judge."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metasae_lib.interpret.examples import Example
from metasae_lib.interpret.judges.questions import Question


class LexicalJudge:
    """No model: an explanation lists the tokens that a feature is strongest on, with weights.

    The weight of a token is the log-odds of being an example's strongest token against being any
    other token of the examples, smoothed by half a count; only tokens above 0 are kept. A text
    scores the sum of its tokens' weights, and is said to fire above the cut that best separates the
    explainer's examples from the silent ones.
    """

    identity: dict[str, Any] = {"judge": "lexical", "version": 2}  # noqa: RUF012

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """Answers at once, in order."""
        for index, question in enumerate(questions):
            yield index, self._answer(question)

    def _answer(self, question: Question) -> str:
        if question.task == "explain":
            return self._explain(question)
        weights, cut = self._read(question.explanation)
        scores = [_lexical_score(weights, example) for example in question.examples]
        if question.task == "fuzzing":
            return "?" if scores[0] == scores[1] else "AB"[scores[1] > scores[0]]
        if question.task == "strength":
            return f"{10 - 10 * math.exp(-scores[0] / 10):.4f}"
        return "?" if not weights else "yes" if scores[0] > cut else "no"

    def _explain(self, question: Question) -> str:
        peaks = Counter(_word(example.pieces[example.peak]) for example in question.examples)
        texts = (*question.examples, *question.against)
        others = Counter(_word(piece) for text in texts for piece in text.pieces) - peaks
        odds = {
            word: math.log((count + 0.5) / (len(question.examples) + 1))
            - math.log((others[word] + 0.5) / (others.total() + 1))
            for word, count in peaks.items()
        }
        heaviest = sorted(odds, key=lambda word: (-odds[word], word))
        weights = {w: weight for w in heaviest if w and (weight := round(odds[w], 2)) > 0}
        fires = [_lexical_score(weights, example) for example in question.examples]
        silent = [_lexical_score(weights, example) for example in question.against]
        cuts = sorted({*fires, *silent})[:-1] or [0.0]

        def balanced(cut: float) -> float:
            hit = sum(score > cut for score in fires) / max(len(fires), 1)
            return hit + sum(score <= cut for score in silent) / max(len(silent), 1)

        return json.dumps({"tokens": weights, "cut": max(cuts, key=balanced)}, ensure_ascii=False)

    @staticmethod
    def _read(explanation: str) -> tuple[dict[str, float], float]:
        try:
            content = json.loads(explanation)
            return dict(content["tokens"]), float(content["cut"])
        except (ValueError, KeyError, TypeError):
            words = re.findall(r"\w+", explanation.lower())  # a sentence: each of its words
            return {word: 1.0 for word in words}, 0.0


def _word(piece: str) -> str:
    return piece.strip().lower()


def _lexical_score(weights: Mapping[str, float], example: Example) -> float:
    return math.fsum(weights.get(_word(piece), 0.0) for piece in example.pieces)
