"""What is asked about a feature: its examples, altered and silent ones, planted concepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.examples import Example, Pieces
from metasae_lib.interpret.judges.questions import Question
from metasae_lib.study import MeasureError
from metasae_lib.study.sections import Negatives

# Words of one meaning, found by themselves in any English text: features with a known explanation.
PLANTED: dict[str, tuple[str, ...]] = {
    "months of the year": ("January", "February", "March", "April", "June", "July", "August",
        "September", "October", "November", "December"),
    "numbers written as words": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "negation, such as not and never": ("not", "never", "nor", "cannot", "without"),
    "money and prices": ("money", "dollars", "price", "cost", "tax", "pay", "paid", "million"),
    "war and the military": ("war", "army", "military", "troops", "soldiers", "navy", "weapons"),
    "rivers, lakes and the sea": ("river", "lake", "sea", "ocean", "water", "coast", "island"),
    "family relations": ("mother", "father", "son", "daughter", "brother", "wife", "husband",
        "family", "children"),
    "schools and universities": ("university", "school", "college", "students", "education"),
    "colours": ("red", "blue", "green", "yellow", "black", "white", "brown"),
    "cooking and ingredients": ("salt", "butter", "sugar", "oil", "sauce", "flour", "heat", "pan"),
    "parliaments and laws": ("law", "bill", "congress", "parliament", "senate", "act", "court"),
    "sports and games": ("football", "team", "game", "player", "players", "league", "season"),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """What is asked about each feature, and on how much of its text.

    `explain` and `score`: examples for the explainer and for the questions, multiples of five,
    disjoint. `rounds`: fuzzing questions. The questions of detection are about the `score` examples
    and as many segments where the feature is silent (`negatives`).
    """

    explain: int = 10
    score: int = 5
    rounds: int = 4
    negatives: Negatives = "random"
    seed: int = 0

    @property
    def examples(self) -> int:
        """Firing segments that a feature needs."""
        return self.explain + self.score


@dataclass(frozen=True)
class Material:
    """What is asked about one feature, before anybody has explained it.

    explain: the explainer's question. pairs: (first, second) of each fuzzing round, and real: which
    of them is real, 0 or 1. examples: for strength and detection. silent: for detection.
    """

    feature: int
    explain: Question
    pairs: tuple[tuple[Example, Example], ...]
    real: tuple[int, ...]
    examples: tuple[Example, ...]
    silent: tuple[Example, ...]

    def questions(self, explanation: str) -> list[Question]:
        """Everything that is asked under one explanation, in the order that `score` reads."""
        return [
            *(Question("fuzzing", explanation, pair) for pair in self.pairs),
            *(Question("strength", explanation, (one,)) for one in self.examples),
            *(Question("detection", explanation, (one,)) for one in self.examples + self.silent),
        ]


class Marginal:
    """Draws tokens as often as the text has them. counts: (vocabulary,) occurrences."""

    def __init__(self, counts: ArrayLike, leave_out: Iterable[int] = ()) -> None:
        weights = np.array(counts, np.float64)
        weights[[token for token in leave_out if token < len(weights)]] = 0
        if (weights > 0).sum() < 2:
            raise MeasureError("the token marginal needs two tokens to draw from")
        self._cumulative = np.cumsum(weights)

    def draw(self, generator: np.random.Generator, other_than: int) -> int:
        """One token, not `other_than`."""
        while True:
            point = generator.random() * self._cumulative[-1]
            token = int(np.searchsorted(self._cumulative, point, side="right"))
            if token != other_than:
                return token


def alter(
    example: Example, marginal: Marginal, pieces: Pieces, generator: np.random.Generator
) -> Example:
    """The example with its highest-activating tokens, those at half of its strength or more,
    replaced by draws from the token marginal (§2)."""
    ids = [
        marginal.draw(generator, token) if act > 0 and act >= example.strength / 2 else token
        for token, act in zip(example.ids, example.acts, strict=True)
    ]
    return replace(example, ids=tuple(ids), pieces=pieces(ids))


def prepare(
    feature: int,
    explain: Sequence[Example],
    score: Sequence[Example],
    silent: Sequence[Example],
    sampling: Sampling,
    marginal: Marginal,
    pieces: Pieces,
) -> Material:
    """The material of one feature, a function of its examples, the sampling and its seed.

    explain, score: as `Sampling` has them; silent: segments for the questions, then for the
    explainer.
    Each fuzzing round has two different examples, the second of which is altered; which of them
    stands first alternates from round to round.
    """
    generator = np.random.default_rng([sampling.seed, feature])
    shuffled = [score[k] for k in generator.permutation(len(score))]
    first = int(generator.integers(2))
    real = tuple((first + k) % 2 for k in range(sampling.rounds))
    pairs = []
    for k, place in enumerate(real):
        kept, source = shuffled[k % len(score)], shuffled[(k + 1) % len(score)]
        both = kept, alter(source, marginal, pieces, generator)
        pairs.append(both if place == 0 else both[::-1])
    asked, against = tuple(silent[: sampling.score]), tuple(silent[sampling.score :])
    question = Question("explain", "", tuple(explain), against)
    return Material(feature, question, tuple(pairs), real, tuple(score), asked)


def materials(contexts: Contexts, features: Iterable[int], sampling: Sampling) -> list[Material]:
    """The material of several features of one arm; MeasureError if one has too few examples."""
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    made = []
    for feature in map(int, features):
        explain, score = contexts.split(feature, sampling.explain, sampling.score)
        silent = contexts.non_activating(feature, sampling.examples, sampling.negatives)
        if len(silent) < sampling.examples:
            raise MeasureError(f"feature {feature} fires almost everywhere: it cannot be scored")
        made.append(prepare(feature, explain, score, silent, sampling, marginal, contexts.pieces))
    return made


def planted(contexts: Contexts, sampling: Sampling, copies: int = 5) -> list[tuple[Material, str]]:
    """Features with a known concept and its explanation: they "fire" on the words of `PLANTED`.

    Their strength is the number of these words, so that a judge can be asked for it. Up to `copies`
    features a concept, on disjoint examples; the questions are about some of every strength. A
    concept whose words are too rare in the text is left out.
    """
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    made = []
    size = sampling.examples
    asked = set(np.linspace(0, size - 1, sampling.score).round().astype(int))
    for number, (explanation, words) in enumerate(PLANTED.items()):
        firing, silent = contexts.with_words(words, copies * size)
        possible = len(firing) // size
        for copy in range(possible):
            part = slice(copy, possible * size, possible)
            examples = sorted(firing[part], key=lambda e: e.strength)
            material = prepare(
                number * copies + copy,
                [example for k, example in enumerate(examples) if k not in asked],
                [example for k, example in enumerate(examples) if k in asked],
                silent[part], sampling, marginal, contexts.pieces,
            )  # fmt: skip
            made.append((material, explanation))
    return made
