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

# Concepts with a known explanation and the words that show them, of meaning and of form. Neighbours
# (first and second, third and fourth, ...) are near misses of each other.
PLANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "meaning": {
        "months of the year": ("January", "February", "March", "April", "June", "July", "August",
            "September", "October", "November", "December"),
        "days of the week": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
            "Sunday"),
        "numbers written as words": ("two", "three", "four", "five", "six", "seven", "eight",
            "nine"),
        "order, such as first and second": ("first", "second", "third", "fourth", "last", "next"),
        "family relations": ("mother", "father", "son", "daughter", "brother", "wife", "husband"),
        "people by sex and age": ("man", "woman", "men", "women", "boy", "girl", "child"),
        "war and the military": ("war", "army", "military", "troops", "soldiers", "navy"),
        "courts and crime": ("court", "police", "crime", "judge", "prison", "justice", "criminal"),
        "cooking ingredients": ("salt", "butter", "sugar", "oil", "sauce", "flour", "milk"),
        "cooking actions": ("cook", "boil", "stir", "mix", "heat", "bake", "add", "pour"),
        "parliaments and laws": ("law", "bill", "congress", "parliament", "senate", "laws"),
        "elections and parties": ("election", "vote", "party", "president", "campaign"),
    },
    "form": {
        "modal verbs, such as would": ("would", "could", "should", "might", "must", "may"),
        "forms of the verb to be": ("is", "was", "were", "are", "been", "being"),
        "pronouns of the third person": ("he", "she", "they", "him", "them"),
        "possessive pronouns, such as its": ("his", "her", "its", "their", "our", "my"),
        "the articles a and the": ("a", "an", "the"),
        "demonstratives, such as those": ("this", "that", "these", "those"),
        "conjunctions, such as and": ("and", "or", "but", "because", "although", "while"),
        "prepositions of place, such as under": ("under", "above", "near", "between", "behind",
            "across", "inside", "outside", "around", "below"),
        "question words, such as who": ("who", "what", "where", "why", "how"),
        "comparatives, such as better": ("more", "less", "better", "larger", "higher", "lower",
            "greater", "older"),
        "commas": (",",),
        "the word of": ("of",),
    },
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


@dataclass(frozen=True)
class Planted:
    """A feature that we made up: it "fires" on the words of one concept, or of two (a blend).

    kind: `meaning` or `form`. concepts: their names, as of `PLANTED`.
    """

    kind: str
    concepts: tuple[str, ...]
    material: Material


def near_miss(concept: str) -> str:
    """The concept that is most like another."""
    names = next(list(named) for named in PLANTED.values() if concept in named)
    return names[names.index(concept) ^ 1]


def planted(
    contexts: Contexts, sampling: Sampling, copies: int, blends: bool = False
) -> list[Planted]:
    """Features of known concepts, or `blends` of two of a kind that are no near misses.

    Their strength is the number of words of the concept, so that a judge can be asked for it. Up to
    `copies` features a concept, on disjoint examples (half of a blend's are of either); the
    questions are about some of every strength. What is too rare in the text is left out.
    """
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    size, made = sampling.examples, list[Planted]()
    asked = set(np.linspace(0, size - 1, sampling.score).round().astype(int))
    for kind, words in PLANTED.items():
        names = list(words)
        partners = zip(names, names[2:] + names[:2], strict=True)
        for concepts in partners if blends else ((name,) for name in names):
            every = [word for name in concepts for word in words[name]]
            firing, silent = contexts.with_words(every, copies * size)
            sets = [firing]
            if blends:
                sets = [contexts.with_words(words[name], copies * size)[0] for name in concepts]
            sizes = [len(part) for part in np.array_split(range(size), len(concepts))]
            possible = min(len(found) // size for found in sets)
            for copy in range(possible):
                chosen = {
                    example.segment: example
                    for found, n in zip(sets, sizes, strict=True)
                    for example in found[copy : possible * size : possible][:n]
                }
                if len(chosen) < size or len(silent) < possible * size:
                    continue  # a segment that shows both halves of a blend
                examples = sorted(chosen.values(), key=lambda e: e.strength)
                material = prepare(
                    len(made),
                    [example for k, example in enumerate(examples) if k not in asked],
                    [example for k, example in enumerate(examples) if k in asked],
                    silent[copy : possible * size : possible], sampling, marginal, contexts.pieces,
                )  # fmt: skip
                made.append(Planted(kind, concepts, material))
    return made
