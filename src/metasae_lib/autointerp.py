"""Auto-interpretability: explanations, three scores, and controls that judge the judge.

A feature's examples are split: an explainer sees some, and the questions are about others. Then

- `fuzzing_score` (the paper's text, §2, App. F): which of two examples is real, when the strongest
  tokens of the other were replaced by draws from the token marginal? -1 to 1, chance 0;
- `spearman_score` (the paper's released code): rank correlation of predicted and true strength;
- `detection_score`: does the feature fire here? Balanced accuracy, chance 0.5.

The steps are apart: `prepare` draws the material, a judge answers, `score` reads the answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from metasae_lib.contexts import Contexts, Example, Negatives, Pieces
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
from metasae_lib.run import Run
from metasae_lib.statistics import (
    needed,
    paired_difference,
    paired_t,
    share_higher,
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

    Up to `copies` features a concept, on disjoint examples. A concept whose words are too rare in
    the text is left out.
    """
    marginal = Marginal(contexts.token_counts, contexts.pieces.special)
    made = []
    for number, (explanation, words) in enumerate(PLANTED.items()):
        firing, silent = contexts.with_words(words, copies * plan.examples)
        for copy in range(min(len(firing), len(silent)) // plan.examples):
            part = slice(copy * plan.examples, (copy + 1) * plan.examples)
            examples, others = firing[part], silent[part]
            material = prepare(
                number * copies + copy, examples[plan.score :], examples[: plan.score],
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
    return Plan(auto.explain_examples, auto.score_examples, auto.rounds)


def judge_of(profile: Profile) -> Judge:
    """The judge that a profile names."""
    auto = profile.autointerp
    if auto.judge == "lexical":
        return LexicalJudge()
    if auto.judge == "in-process":
        return InProcessJudge(auto.model)
    return HttpJudge(auto.url, auto.model, auto.parallel)


def remembered(run: Run, judge: Judge, asking: int = 0) -> Answers:
    """A judge's answers, kept with their prompts in the run's artefacts: nothing is asked twice.

    asking: another number is another table, for a test-retest that must not remember.
    """
    about = judge.identity | ({"asking": asking} if asking else {})
    return AskOnce(judge, run.artefact("answers", about).folder / "answers.sqlite").answers


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
    right, wrong = (by[name][score_name].fillna(CHANCE[score_name]) for name in ("right", "shuffled"))
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
        both = pd.concat([right, by["again"][score_name]], axis=1).dropna()
        same = bool((both.iloc[:, 0] == both.iloc[:, 1]).all())
        alike = 1.0 if same else both.iloc[:, 0].corr(both.iloc[:, 1])
        checks.append((alike >= 0.8, f"asked again, correlation {alike:.2f}"))
    able = all(passed for passed, _ in checks)
    reasons = [reason for passed, reason in checks if able or not passed]
    return Verdict(score_name, able, tuple(reasons))


def control_summary(controls: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval of every score by group and condition, with the number of features.

    Columns: group, condition, score, mean, low, high, n, chance.
    """
    rows = []
    for (group, condition), frame in controls.groupby(["group", "condition"], sort=False):
        for name in SCORES:
            mean, low, high = _interval(frame[name])
            rows.append(
                {
                    "group": group, "condition": condition, "score": name, "mean": mean,
                    "low": low, "high": high, "n": int(frame[name].notna().sum()),
                    "chance": CHANCE[name],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


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
