"""Auto-interpretability: explanations, three scores, and controls that judge the judge.

A feature's examples are split: an explainer sees some, and the questions are about others. Then

- `fuzzing_score` (the paper's text, §2, App. F): which of two examples is real, when the strongest
  tokens of the other were replaced by draws from the token marginal? -1 to 1, chance 0;
- `spearman_score` (the paper's released code): rank correlation of predicted and true strength;
- `detection_score`: does the feature fire here? Balanced accuracy, chance 0.5.

The steps are apart: `prepare` draws the material, a judge answers, `score` reads the answers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from metasae_lib.contexts import QUANTILES, Contexts, Example, Pieces
from metasae_lib.errors import MeasureError
from metasae_lib.judges import (
    AskOnce,
    HttpJudge,
    InProcessJudge,
    Judge,
    LexicalJudge,
    Question,
    Value,
    parse,
)
from metasae_lib.matching import hungarian
from metasae_lib.profile import Negatives
from metasae_lib.run import Run
from metasae_lib.statistics import (
    needed,
    paired_difference,
    paired_t,
    share_higher,
    wilson,
)

if TYPE_CHECKING:
    from metasae_lib.profile import Profile
    from metasae_lib.training import Arm

Answers = Callable[[Sequence[Question]], Sequence[str | None]]
SCORES = ("fuzzing", "spearman", "detection")
CHANCE = {"fuzzing": 0.0, "spearman": 0.0, "detection": 0.5}

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


# --------------------------------------------------------------------------- the three scores


def fuzzing_score(correct: Sequence[bool | None]) -> float | None:
    """Mean of +1 for each right and -1 for each wrong answer; chance 0.

    correct: True, False, or None for an answer that could not be read, which counts for nothing.
    None if no answer could be read.
    """
    answered = [1 if right else -1 for right in correct if right is not None]
    return sum(answered) / len(answered) if answered else None


def spearman_score(
    predicted: Sequence[float | None] | None, actual: Sequence[float]
) -> float | None:
    """Spearman's rank correlation of predicted with true strengths, ties at their mean rank.

    0.0 for predictions that are all equal: they say nothing. None if any prediction could not be
    read, or if the true strengths are all equal (or fewer than two), which nothing can follow.
    Raises MeasureError for lists of different length.
    """
    values = [value for value in predicted or [] if value is not None and np.isfinite(value)]
    if predicted is None or len(values) < len(predicted):
        return None
    if len(values) != len(actual):
        raise MeasureError(
            f"{len(values)} predictions for {len(actual)} strengths: give one for each"
        )
    if len(set(actual)) < 2:
        return None
    if len(set(values)) < 2:
        return 0.0
    return float(scipy.stats.spearmanr(values, actual).statistic)


def detection_score(predicted: Sequence[bool | None], actual: Sequence[bool]) -> float | None:
    """Balanced accuracy: the mean of the shares answered rightly among true and among false.

    Answers that could not be read (None) count for nothing. None if either kind has no answer: one
    kind alone would reward a judge that always says the same. Raises MeasureError for lists of
    different length.
    """
    if len(predicted) != len(actual):
        raise MeasureError(
            f"{len(predicted)} answers to {len(actual)} questions: give one for each"
        )
    shares = []
    for kind in (True, False):
        right = [
            p == kind for p, a in zip(predicted, actual, strict=True) if a == kind and p is not None
        ]
        if not right:
            return None
        shares.append(sum(right) / len(right))
    return sum(shares) / 2


# --------------------------------------------------------------------------- material


@dataclass(frozen=True)
class Plan:
    """How much is asked. `explain` and `score`: examples for the explainer and for the questions,
    multiples of five, disjoint. `rounds`: fuzzing questions. The questions of detection are about
    the `score` examples and as many segments where the feature is silent (`negatives`)."""

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
            *(Question("strength", explanation, (example,)) for example in self.examples),
            *(
                Question("detection", explanation, (example,))
                for example in (*self.examples, *self.silent)
            ),
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
    against: Sequence[Example],
    plan: Plan,
    marginal: Marginal,
    pieces: Pieces,
) -> Material:
    """The material of one feature, a function of its examples, the plan and `plan.seed`.

    Each fuzzing round has two different examples, the second of which is altered; which of them
    stands first alternates from round to round.
    """
    generator = np.random.default_rng([plan.seed, feature])
    order = generator.permutation(len(score))
    first = int(generator.integers(2))
    pairs, real = [], []
    for k in range(plan.rounds):
        kept = score[order[k % len(score)]]
        other = alter(score[order[(k + 1) % len(score)]], marginal, pieces, generator)
        place = (first + k) % 2
        pairs.append((kept, other) if place == 0 else (other, kept))
        real.append(place)
    return Material(
        feature,
        Question("explain", "", tuple(explain), tuple(against)),
        tuple(pairs),
        tuple(real),
        tuple(score),
        tuple(silent),
    )


def materials(contexts: Contexts, features: Iterable[int], plan: Plan) -> list[Material]:
    """The material of several features of one arm; MeasureError if one has too few examples."""
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    made = []
    for feature in map(int, features):
        explain, score = contexts.split(feature, plan.explain, plan.score)
        silent = contexts.non_activating(feature, plan.examples, plan.negatives)
        if len(silent) < plan.examples:
            raise MeasureError(f"feature {feature} fires almost everywhere: it cannot be scored")
        asked, against = silent[: plan.score], silent[plan.score :]
        made.append(
            prepare(feature, explain, score, asked, against, plan, marginal, contexts.pieces)
        )
    return made


def planted(contexts: Contexts, plan: Plan, copies: int = 5) -> list[tuple[Material, str]]:
    """Features with a known concept and its explanation: they "fire" on the words of `PLANTED`.

    Their strength is the number of these words, so that a judge can be asked for it. Up to `copies`
    features a concept, on disjoint examples; the questions are about some of every strength. A
    concept whose words are too rare in the text is left out.
    """
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    made = []
    for number, (explanation, words) in enumerate(PLANTED.items()):
        firing, silent = contexts.with_words(words, copies * plan.examples)
        possible = len(firing) // plan.examples
        for copy in range(possible):
            part = slice(copy, possible * plan.examples, possible)
            examples, others = sorted(firing[part], key=lambda e: e.strength), silent[part]
            asked = set(np.linspace(0, plan.examples - 1, plan.score).round().astype(int))
            material = prepare(
                number * copies + copy,
                [example for k, example in enumerate(examples) if k not in asked],
                [example for k, example in enumerate(examples) if k in asked],
                others[: plan.score], others[plan.score :], plan, marginal, contexts.pieces,
            )  # fmt: skip
            made.append((material, explanation))
    return made


# --------------------------------------------------------------------------- asking and scoring


def answers_of(judge: Judge) -> Answers:
    """A judge's raw answers in the order of the questions, kept nowhere."""

    def answers(questions: Sequence[Question]) -> list[str | None]:
        found = dict(judge.ask(questions))
        return [found.get(index) for index in range(len(questions))]

    return answers


def explain(made: Sequence[Material], answers: Answers) -> list[str | None]:
    """One explanation for each feature; None where the explainer gave none."""
    questions = [material.explain for material in made]
    explanations: list[str | None] = []
    for question, answer in zip(questions, answers(questions), strict=True):
        value = parse(question, answer)
        explanations.append(None if value is None else str(value))
    return explanations


def delphi_records(
    made: Sequence[Material], explanations: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Features in the form that Delphi scores: the fields of its `LatentRecord`, as plain JSON.

    train and test are the examples of the explainer and of the questions, test by quintile, the
    weakest first; not_active those in which the feature is silent. tokens and activations, each
    (window,), become tensors in Delphi. Features without an explanation are left out.
    """

    def fields(example: Example) -> dict[str, Any]:
        return {
            "tokens": list(example.ids),
            "activations": list(map(float, example.acts)),
            "str_tokens": list(example.pieces),
        }

    return [
        {
            "latent": {"module_name": "metasae", "latent_index": material.feature},
            "explanation": explanation,
            "train": [fields(example) for example in material.explain.examples],
            "test": [
                fields(example) | {"quantile": QUANTILES * k // len(material.examples)}
                for k, example in enumerate(material.examples)
            ],
            "not_active": [fields(example) for example in material.silent],
        }
        for material, explanation in zip(made, explanations, strict=True)
        if explanation is not None
    ]


def in_words(explanation: str | None) -> str | None:
    """A lexical explanation as a judge that reads words gets it: its heaviest tokens."""
    try:
        tokens = list(json.loads(explanation or "")["tokens"])
    except (ValueError, KeyError, TypeError):
        return explanation
    return ", ".join(tokens[:6]) or None


def score(
    made: Sequence[Material], explanations: Sequence[str | None], answers: Answers
) -> pd.DataFrame:
    """Ask everything about every feature and score it.

    Features without an explanation (None) are not asked about; an empty one ("") is a control.
    Columns: feature, explanation, the three scores (nan for none), asked, unreadable (asked and not
    read as an answer), said_first and fuzzed (fuzzing answers "A", and all that were read).
    """
    if len(made) != len(explanations):
        raise MeasureError(f"{len(explanations)} explanations for {len(made)} features")
    questions: list[Question] = []
    ranges = []
    for material, explanation in zip(made, explanations, strict=True):
        asked = [] if explanation is None else material.questions(explanation)
        ranges.append((len(questions), len(questions) + len(asked)))
        questions += asked
    raw = answers(questions)
    values = [parse(question, answer) for question, answer in zip(questions, raw, strict=True)]
    rows = [
        {"feature": material.feature, "explanation": explanation}
        | _scores(material, values[start:stop])
        for material, explanation, (start, stop) in zip(made, explanations, ranges, strict=True)
    ]
    return pd.DataFrame(rows)


def _scores(material: Material, values: Sequence[Value | None]) -> dict[str, Any]:
    rounds, n = len(material.pairs), len(material.examples)
    fuzz, strength, detect = values[:rounds], values[rounds : rounds + n], values[rounds + n :]
    row: dict[str, Any] = {
        "asked": len(values),
        "unreadable": sum(value is None for value in values),
        "said_first": sum(value == 0 for value in fuzz if value is not None),
        "fuzzed": sum(value is not None for value in fuzz),
        **dict.fromkeys(SCORES, float("nan")),
    }
    if not values:
        return row
    truth = [True] * n + [False] * len(material.silent)
    right = [
        None if value is None else value == real
        for value, real in zip(fuzz, material.real, strict=True)
    ]
    scores = {
        "fuzzing": fuzzing_score(right),
        "spearman": spearman_score(
            [None if value is None else float(value) for value in strength],
            [example.strength for example in material.examples],
        ),
        "detection": detection_score(
            [None if value is None else bool(value) for value in detect], truth
        ),
    }
    return row | {name: value for name, value in scores.items() if value is not None}


def plan_of(profile: Profile) -> Plan:
    """How much a profile asks."""
    auto = profile.autointerp
    return Plan(auto.explain_examples, auto.score_examples, auto.rounds, auto.negatives)


def judge_of(profile: Profile) -> Judge:
    """The judge that a profile names."""
    auto = profile.autointerp
    if auto.judge == "lexical":
        return LexicalJudge()
    if auto.judge == "in-process":
        return InProcessJudge(auto.model)
    return HttpJudge(auto.url, auto.model, auto.parallel)


def answers_for(run: Run, judge: Judge, asking: int = 0) -> Answers:
    """A judge's answers, kept with their prompts in the run's artefacts: nothing is asked twice.

    asking: another number is another table, for a test-retest that must not remember. The lexical
    judge is asked anew each time: it takes no time, and prompts do not hold all that it looks at.
    """
    if isinstance(judge, LexicalJudge):
        return answers_of(judge)
    about = judge.identity | ({"asking": asking} if asking else {})
    return AskOnce(judge, run.artefact("answers", about).folder / "answers.sqlite").answers


def explanations_of(
    profile: Profile, judge: Judge, made: Sequence[Material], answers: Answers
) -> list[str | None]:
    """Explanations by the profile's explainer: the judge itself, or the lexical judge's tokens."""
    if isinstance(judge, LexicalJudge) or profile.autointerp.explainer == "judge":
        return explain(made, answers)
    return [in_words(text) for text in explain(made, answers_of(LexicalJudge()))]


# --------------------------------------------------------------------------- controls


def shuffled(explanations: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """Every explanation given to another feature, with another text where there is one."""
    order = np.random.default_rng(seed).permutation(len(explanations))
    shift = next(
        (
            k
            for k in range(1, len(order))
            if all(explanations[order[i]] != explanations[order[i - k]] for i in range(len(order)))
        ),
        len(order) // 2,
    )
    given: list[str | None] = [None] * len(order)
    for i, place in enumerate(order):
        given[place] = explanations[order[i - shift]]
    return given


def control_table(
    known: Sequence[tuple[Material, str]],
    own: Sequence[tuple[Material, str]],
    answers: Answers,
    again: Answers | None = None,
) -> pd.DataFrame:
    """What a judge makes of right, wrong and empty explanations: one row a feature and condition.

    known: planted features with their explanations. own: features of a dictionary with the
    explanations under study. again: a second asking, which must not remember the first, for
    test-retest. Columns as `score`, and group (`planted`, `features`) and condition (`right`,
    `shuffled`, `empty`, `again`).
    """
    frames = []
    for group, made in (("planted", known), ("features", own)):
        if not made:
            continue
        subjects, right = [material for material, _ in made], [text for _, text in made]
        conditions: dict[str, Sequence[str | None]] = {
            "right": right, "shuffled": shuffled(right), "empty": [""] * len(right)
        }  # fmt: skip
        for condition, explanations in conditions.items():
            frame = score(subjects, explanations, answers)
            frames.append(frame.assign(group=group, condition=condition))
        if again is not None and group == "planted":
            # In another order: what a judge says must not depend on what it was asked before.
            frame = score(subjects[::-1], right[::-1], again)[::-1]
            frames.append(frame.assign(group=group, condition="again"))
    return pd.concat(frames, ignore_index=True)


def examine(run: Run, contexts: Contexts, judge: Judge, features: int = 30) -> pd.DataFrame:
    """`control_table` of a judge on one arm's text: planted features, and some of its own.

    The lexical judge cannot read sentences, so it explains the planted features itself.
    """
    plan, answers = plan_of(run.profile), answers_for(run, judge)
    known = planted(contexts, plan, copies=3)
    if isinstance(judge, LexicalJudge):
        own_words = explain([material for material, _ in known], answers)
        known = [(m, text or "") for (m, _), text in zip(known, own_words, strict=True)]
    usable = contexts.usable(plan.examples, plan.examples)
    sample = np.random.default_rng(plan.seed).permutation(usable)[:features]
    made = materials(contexts, sample, plan)
    texts = explanations_of(run.profile, judge, made, answers)
    own = [(m, text) for m, text in zip(made, texts, strict=True) if text is not None]
    return control_table(known, own, answers, answers_for(run, judge, asking=1))


@dataclass(frozen=True)
class Verdict:
    """Whether a judge can be believed on one score, and what that rests on."""

    score: str
    able: bool
    reasons: tuple[str, ...]

    @property
    def words(self) -> str:
        """One sentence."""
        what = "able" if self.able else "unable"
        return f"{what} to judge by {self.score}: {'; '.join(self.reasons)}"


def judge_verdict(controls: pd.DataFrame, score_name: str = "fuzzing") -> Verdict:
    """Whether the judge tells a right explanation from a wrong one, on planted features.

    All of these, fixed beforehand: with the right explanation the score is above chance (95%
    interval of the mean); it is above that of the shuffled explanations (95% interval of the paired
    difference); at most a tenth of its answers cannot be read; it says "A" in 30% to 70% of the
    fuzzing rounds; asked again, its scores correlate by 0.8 or more. Raises MeasureError for an
    unknown score.
    """
    if score_name not in SCORES:
        raise MeasureError(f"there is no score '{score_name}': choose one of {', '.join(SCORES)}")
    part = controls[controls.group == "planted"]
    by = {name: frame.reset_index(drop=True) for name, frame in part.groupby("condition")}
    # Where a judge could not answer it has shown nothing: that is chance.
    right, wrong = (
        by[name][score_name].fillna(CHANCE[score_name]) for name in ("right", "shuffled")
    )
    if by["right"][score_name].isna().all() and not by["right"].unreadable.any():
        why = "the planted features give it nothing to score, such as strengths that differ"
        return Verdict(score_name, False, (why,))
    checks: list[tuple[bool, str]] = []
    above = _interval(right - CHANCE[score_name])
    checks.append(
        (
            above[1] > 0,
            f"right explanations score {right.mean():.3f} (chance {CHANCE[score_name]:g})",
        )
    )
    gain = _interval(right - wrong)
    checks.append(
        (gain[1] > 0, f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f}) against shuffled ones")
    )
    unread = by["right"].unreadable.sum() / max(by["right"].asked.sum(), 1)
    checks.append((unread <= 0.1, f"{unread:.0%} of the answers unreadable"))
    first = by["right"].said_first.sum() / max(by["right"].fuzzed.sum(), 1)
    checks.append((0.3 <= first <= 0.7, f"says 'A' in {first:.0%} of the rounds"))
    if "again" in by:
        alike, _, _ = _alike(by["right"][score_name], by["again"][score_name])
        checks.append((alike >= 0.8, f"asked again, correlation {alike:.2f}"))
    able = all(passed for passed, _ in checks)
    reasons = [reason for passed, reason in checks if able or not passed]
    return Verdict(score_name, able, tuple(reasons))


def control_summary(controls: pd.DataFrame) -> pd.DataFrame:
    """Every control as a mean with its 95% interval, and `n`, what it is the mean of.

    Columns: group, condition, score, mean, low, high, n, chance. Besides the three scores, by group
    and condition, `score` is `order bias` (share of "A" among the fuzzing answers; the real text
    stands first in half of the rounds) or `asked again` (of planted features, with the score's
    name as condition: correlation of their scores between two askings, 1 where all are equal).
    """
    rows: list[tuple[Any, ...]] = []
    for (group, condition), frame in controls.groupby(["group", "condition"], sort=False):
        for name in SCORES:
            n = int(frame[name].notna().sum())
            rows.append((group, condition, name, *_interval(frame[name]), n, CHANCE[name]))
        if rounds := int(frame.fuzzed.sum()):
            first = int(frame.said_first.sum())
            share = (first / rounds, *wilson(first, rounds))
            rows.append((group, condition, "order bias", *share, rounds, 0.5))
    by = {k: f.reset_index(drop=True) for k, f in controls.groupby(["group", "condition"])}
    if ("planted", "again") in by:
        for name in SCORES:
            first_time, again = (by["planted", when][name] for when in ("right", "again"))
            both = int((first_time.notna() & again.notna()).sum())
            alike = _alike(first_time, again)
            rows.append(("planted", name, "asked again", *alike, both, 0.0))
    columns = ["group", "condition", "score", "mean", "low", "high", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


def _alike(once: pd.Series, again: pd.Series) -> tuple[float, float, float]:
    """Correlation with its 95% interval; 1 where all are equal, nan where there is none."""
    both = pd.concat([once, again], axis=1).dropna().to_numpy()
    if len(both) and (both[:, 0] == both[:, 1]).all():
        return 1.0, 1.0, 1.0
    if len(both) < 4 or (np.ptp(both, axis=0) == 0).any():
        return (float("nan"),) * 3
    found = scipy.stats.pearsonr(both[:, 0], both[:, 1])
    low, high = found.confidence_interval()
    return float(found.statistic), float(low), float(high)


def _interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean and 95% interval, nan where there is nothing to average."""
    found = values.dropna()
    if found.empty:
        return (float("nan"),) * 3
    effect = paired_difference(found)
    return effect.difference, effect.low, effect.high


# --------------------------------------------------------------------------- joint against solo


def matched_pairs(solo: Arm, joint: Arm) -> pd.DataFrame:
    """Hungarian matching of two arms on decoder cosine. Columns: solo, joint, cosine."""
    rows, columns, cosines = hungarian(solo.sae.W_dec, joint.sae.W_dec)
    return pd.DataFrame({"solo": rows, "joint": columns, "cosine": cosines})


def choose_pairs(
    pairs: pd.DataFrame, solo: Contexts, joint: Contexts, plan: Plan, count: int, cosine: float
) -> pd.DataFrame:
    """Up to `count` of the pairs at a cosine or more whose features both have enough examples.

    A random sample by `plan.seed`, in ascending order of the solo feature; a larger count has the
    smaller one's pairs among its own.
    """
    can = {
        name: contexts.usable(plan.examples, plan.examples)
        for name, contexts in (("solo", solo), ("joint", joint))
    }
    kept = pairs[
        (pairs.cosine >= cosine) & pairs.solo.isin(can["solo"]) & pairs.joint.isin(can["joint"])
    ]
    order = np.random.default_rng(plan.seed).permutation(len(pairs))
    rank = pd.Series(order, index=pairs.index)[kept.index]
    return kept.loc[rank.sort_values().index[:count]].sort_values("solo").reset_index(drop=True)


def compare(
    pairs: pd.DataFrame, solo: pd.DataFrame, joint: pd.DataFrame, score_name: str, resamples: int
) -> dict[str, float]:
    """Joint minus solo over pairs of features (§5.2). solo, joint: frames of `score`.

    pairs: columns solo and joint. Pairs of which either has no score are left out and counted.
    Returns n, lost, solo and joint means, delta with its bootstrap interval (low, high), t, p, d,
    share higher (ties left out) with its interval, ties, the change in percent, and the pairs
    needed to see the paper's effect size at this many, with a power of 80%. nan where the
    differences do not vary.
    """
    a = pairs.solo.map(solo.set_index("feature")[score_name]).to_numpy(float)
    b = pairs.joint.map(joint.set_index("feature")[score_name]).to_numpy(float)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    nothing = float("nan")
    result: dict[str, float] = {"n": int(both.sum()), "lost": int((~both).sum())}
    if not len(a):
        return result
    low, high = bootstrap_mean(b - a, resamples)
    result |= {
        "solo": float(a.mean()), "joint": float(b.mean()), "delta": float((b - a).mean()),
        "low": low, "high": high, "ties": int((a == b).sum()),
        "percent": 100 * float((b - a).mean() / a.mean()) if a.mean() > 0 else nothing,
    }  # fmt: skip
    if len(a) < 2 or np.ptp(b - a) == 0:
        return result | dict.fromkeys(
            ("t", "p", "d", "higher", "higher_low", "higher_high"), nothing
        )
    test = paired_t(b - a)
    higher = share_higher(b - a)
    return result | {
        "t": test.t, "p": test.p, "d": test.d,
        "higher": higher[0], "higher_low": higher[1], "higher_high": higher[2],
        "spread": float(np.std(b - a, ddof=1)),
    }  # fmt: skip


def pairs_needed(spread: float, delta: float = 0.0175, power: float = 0.8) -> int:
    """Pairs that show a mean difference `delta` (the paper's by default) that often.

    spread: standard deviation of the differences of pairs.
    """
    return needed(delta / spread, power)


def bootstrap_mean(
    values: ArrayLike, resamples: int, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over resamples of the values (n,)."""
    x = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    means: NDArray[np.float64] = np.array(
        [x[generator.integers(len(x), size=len(x))].mean() for _ in range(max(resamples, 1000))]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --------------------------------------------------------------------------- what pages show


def score_features(
    run: Run, contexts: Contexts, features: Iterable[int], judge: Judge
) -> pd.DataFrame:
    """Explain and score features of one arm as the profile says; `score` has the columns."""
    plan, answers = plan_of(run.profile), answers_for(run, judge)
    made = materials(contexts, features, plan)
    return score(made, explanations_of(run.profile, judge, made, answers), answers)


def score_pairs(
    run: Run,
    contexts: Mapping[str, Contexts],
    asked: Mapping[str, pd.DataFrame],
    judges: Mapping[str, Judge],
) -> pd.DataFrame:
    """`score_features` for every judge over its pairs of features.

    contexts: by kind, `solo` and `joint`. asked: pairs by judge. Columns as `score`, and judge and
    kind.
    """
    return pd.concat(
        [
            score_features(run, mine, pairs[kind], judges[judge]).assign(judge=judge, kind=kind)
            for judge, pairs in asked.items()
            for kind, mine in contexts.items()
        ],
        ignore_index=True,
    )


def kept_pairs(pairs: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """How many matched pairs several cosine thresholds keep. Columns: cosine, pairs, share."""
    kept = [int((pairs.cosine >= threshold).sum()) for threshold in thresholds]
    return pd.DataFrame(
        {"cosine": thresholds, "pairs": kept, "share": [k / len(pairs) for k in kept]}
    )


def verdict_table(controls: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every judge's verdict on every score. controls: `control_table` by judge.

    Columns: judge, score, able, because.
    """
    verdicts = [
        (judge, judge_verdict(frame, name)) for judge, frame in controls.items() for name in SCORES
    ]
    return pd.DataFrame(
        {
            "judge": [judge for judge, _ in verdicts],
            "score": [verdict.score for _, verdict in verdicts],
            "able": [verdict.able for _, verdict in verdicts],
            "because": ["; ".join(verdict.reasons) for _, verdict in verdicts],
        }
    )


def first_line(verdicts: pd.DataFrame, judge: str) -> str:
    """What a page has to say before anything else about the judge that its results rest on."""
    mine = verdicts[verdicts.judge == judge].set_index("score")
    words = "able" if mine.able["fuzzing"] else "unable"
    line = f"**The {judge} judge is {words} to judge by fuzzing**: {mine.because['fuzzing']}."
    others = [f"{name}: {'able' if mine.able[name] else 'unable'}" for name in SCORES[1:]]
    if not mine.able["fuzzing"]:
        line += " So its fuzzing scores below say nothing about the dictionaries."
    return f"{line} By its other scores ({', '.join(others)})."


def compare_all(
    asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame, resamples: int
) -> pd.DataFrame:
    """`compare` for every judge and score, over its matched pairs and over the same features
    paired at random.

    asked: pairs by judge. scores: frames of `score` with the columns judge and kind (solo, joint).
    Columns: judge, pairs (`matched`, `random`), score, and those of `compare`.
    """
    rows = []
    for judge, pairs in asked.items():
        mine = scores[scores.judge == judge]
        solo, joint = (mine[mine.kind == kind] for kind in ("solo", "joint"))
        random = pairs.assign(joint=pairs.joint.sample(frac=1, random_state=0).to_numpy())
        for which, chosen in (("matched", pairs), ("random", random)):
            for name in SCORES:
                found = compare(chosen, solo, joint, name, resamples)
                rows.append({"judge": judge, "pairs": which, "score": name} | found)
    return pd.DataFrame(rows)


def figure_2(asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame) -> pd.DataFrame:
    """`density_difference` of fuzzing scores over each judge's pairs, with a column judge."""
    frames = []
    for judge, pairs in asked.items():
        mine = scores[scores.judge == judge].set_index("feature")
        both = pd.DataFrame(
            {kind: pairs[kind].map(mine[mine.kind == kind].fuzzing) for kind in ("solo", "joint")}
        ).dropna()
        if len(both):
            frames.append(density_difference(both.solo, both.joint).assign(judge=judge))
    columns = ["score", "difference", "low", "high", "judge"]
    return pd.concat(frames) if frames else pd.DataFrame(columns=columns)


def density_difference(
    solo: ArrayLike, joint: ArrayLike, bins: int = 20, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Figure 2: density of the joint scores minus that of the solo ones, on [-1, 1].

    solo, joint: (n,) scores of matched pairs. Columns: score (bin centre), difference (per unit of
    score), low and high (95%, pairs resampled).
    """
    a, b = np.asarray(solo, np.float64), np.asarray(joint, np.float64)
    edges = np.linspace(-1, 1, bins + 1)
    places = [np.clip(np.digitize(x, edges) - 1, 0, bins - 1) for x in (a, b)]
    change = np.zeros((len(a), bins))
    change[np.arange(len(a)), places[1]] += 1
    change[np.arange(len(a)), places[0]] -= 1
    change /= edges[1] - edges[0]
    generator = np.random.default_rng(seed)
    draws = [change[generator.integers(len(a), size=len(a))].mean(axis=0) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "score": (edges[:-1] + edges[1:]) / 2, "difference": change.mean(axis=0),
            "low": low, "high": high,
        }
    )  # fmt: skip


def published_values(found: dict[str, float], matched: int) -> pd.DataFrame:
    """A fuzzing comparison (`compare`) under the ids of the paper's values (§5.2, §4, §6).

    Columns: id, value, low, high, words.
    """
    nothing = float("nan")
    solo = found.get("solo", nothing)
    percent = [100 * found.get(name, nothing) / solo for name in ("delta", "low", "high")]
    change = tuple(percent) if solo > 0 else (nothing,) * 3
    share = [100 * found.get(name, nothing) for name in ("higher", "higher_low", "higher_high")]
    gpt2 = {
        "fuzz_joint_mean": (found.get("joint", nothing), nothing, nothing),
        "fuzz_solo_mean": (solo, nothing, nothing),
        "fuzz_paired_delta": tuple(found.get(name, nothing) for name in ("delta", "low", "high")),
        "fuzz_delta_pct": change,
        "fuzz_paired_t": (found.get("t", nothing), nothing, nothing),
        "fuzz_paired_p": (found.get("p", nothing), nothing, nothing),
        "fuzz_joint_higher_pct": tuple(share),
        "matched_pairs": (float(matched), nothing, nothing),
    }
    rows = {f"gpt2-large.{name}": row for name, row in gpt2.items()}
    rows["gemma-2-9b.fuzz_delta_pct_selected"] = change
    return pd.DataFrame(
        [
            {"id": name, "value": value, "low": low, "high": high, "words": ""}
            for name, (value, low, high) in rows.items()
        ]
    )


def highlighted(example: Example) -> str:
    """An example as HTML, its tokens shaded by activation. Its text is escaped: it is the web's."""
    parts = []
    for piece, act in zip(example.pieces, example.acts, strict=True):
        text = html.escape(piece)
        if act > 0 and piece:
            shade = 0.25 + 0.75 * act / example.strength
            text = (
                f'<mark style="background:rgba(230,159,0,{shade:.2f});color:inherit" '
                f'title="{act:.2f}">{text}</mark>'
            )
        parts.append(text)
    return "".join(parts)


def examples_page(contexts: Contexts, frame: pd.DataFrame, examples: int = 3) -> str:
    """Features with their explanation, scores and strongest examples, as HTML.

    frame: columns feature, explanation, fuzzing, spearman, detection.
    """
    parts = []
    for row in frame.to_dict("records"):
        text = html.escape(in_words(row["explanation"]) or "no explanation")
        lines = "".join(
            f"<li>… {highlighted(example)} …</li>"
            for example in contexts.top(int(row["feature"]), examples)
        )
        parts.append(
            f"<p><strong>Feature {row['feature']}</strong>: {text}<br>"
            f"fuzzing {row['fuzzing']:+.2f}, Spearman {row['spearman']:+.2f}, "
            f"detection {row['detection']:.2f}</p><ul>{lines}</ul>"
        )
    return "".join(parts)
