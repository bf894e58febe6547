"""Explanations, and three scores of how well they predict a feature.

A feature's examples are split: an explainer sees some, and the questions are about others. Then

- `fuzzing_score` (the paper's text, §2, App. F): which of two examples is real, when the strongest
  tokens of the other were replaced by draws from the token marginal? -1 to 1, chance 0;
- `spearman_score` (the paper's released code): rank correlation of predicted and true strength;
- `detection_score`: does the feature fire here? Balanced accuracy, chance 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.judges.embedding import EmbeddingJudge
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.judges.questions import AskOnce, Judge, Question, Value, parse
from metasae_lib.interpret.material import Material, Sampling, materials
from metasae_lib.study import MeasureError, Profile, Run

_COLUMNS = (
    "feature", "explanation", "asked", "unreadable", "said_first", "fuzzed", "fuzzing", "spearman",
    "detection",
)  # fmt: skip
Answers = Callable[[Sequence[Question]], Sequence[str | None]]
SCORES = ("fuzzing", "spearman", "detection")
_USUAL = 200  # segments of the corpus that say how near an explanation is to any text
CHANCE = {"fuzzing": 0.0, "spearman": 0.0, "detection": 0.5}


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
    varied = len(set(values)) > 1
    return float(scipy.stats.spearmanr(values, actual).statistic) if varied else 0.0


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
    answered = [(p, a) for p, a in zip(predicted, actual, strict=True) if p is not None]
    right = [[p == kind for p, a in answered if a == kind] for kind in (True, False)]
    return sum(sum(one) / len(one) for one in right) / 2 if all(right) else None


def answers_of(judge: Judge) -> Answers:
    """A judge's raw answers in the order of the questions, kept nowhere."""

    def answers(questions: Sequence[Question]) -> list[str | None]:
        found = dict(judge.ask(questions))
        return [found.get(index) for index in range(len(questions))]

    return answers


def explain(made: Sequence[Material], answers: Answers) -> list[str | None]:
    """One explanation for each feature; None where the explainer gave none."""
    values = _read([material.explain for material in made], answers)
    return [None if value is None else str(value) for value in values]


def _read(questions: Sequence[Question], answers: Answers) -> list[Value | None]:
    return [parse(q, answer) for q, answer in zip(questions, answers(questions), strict=True)]


def in_words(explanation: object) -> str | None:
    """A lexical explanation as a judge that reads words gets it: its heaviest tokens.

    None if there is no explanation: a table has NaN there.
    """
    if not isinstance(explanation, str):
        return None
    try:
        return ", ".join(list(json.loads(explanation)["tokens"])[:6]) or None
    except (ValueError, KeyError, TypeError):
        return explanation


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
    asked = [
        [] if explanation is None else material.questions(explanation)
        for material, explanation in zip(made, explanations, strict=True)
    ]
    values = iter(_read(list(chain.from_iterable(asked)), answers))
    rows = [
        {"feature": material.feature, "explanation": explanation}
        | _scores(material, list(islice(values, len(mine))))
        for material, explanation, mine in zip(made, explanations, asked, strict=True)
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _scores(material: Material, values: list[Any]) -> dict[str, Any]:
    rounds, n = len(material.pairs), len(material.examples)
    said = values or [None] * len(material.questions(""))
    fuzz, strength, detect = said[:rounds], said[rounds : rounds + n], said[rounds + n :]
    pairs = zip(fuzz, material.real, strict=True)
    found = (
        fuzzing_score([None if answer is None else answer == real for answer, real in pairs]),
        spearman_score(strength, [example.strength for example in material.examples]),
        detection_score(detect, [True] * n + [False] * len(material.silent)),
    )
    return {
        "asked": len(values),
        "unreadable": values.count(None),
        "said_first": fuzz.count(0),
        "fuzzed": len(fuzz) - fuzz.count(None),
        **{k: np.nan if value is None else value for k, value in zip(SCORES, found, strict=True)},
    }


def sampling_of(profile: Profile) -> Sampling:
    """What a profile asks about each feature."""
    auto = profile.autointerp
    return Sampling(auto.explain_examples, auto.score_examples, auto.rounds, auto.negatives)


def judge_of(profile: Profile, contexts: Contexts) -> Judge:
    """The judge that a profile names. contexts: of any arm; the text that is usual."""
    auto = profile.autointerp
    if auto.judge == "embedding":
        return EmbeddingJudge(auto.model, [one.text for one in contexts.sample(_USUAL)])
    return LexicalJudge() if auto.judge == "lexical" else _model(profile, auto.judge, auto.model)


def _explainer_of(run: Run, judge: Judge) -> Judge:
    """Who writes the explanations that a judge gets; a model is loaded once a run. The lexical
    judge weighs its own."""
    auto = run.profile.autointerp
    if auto.explainer == "judge" or isinstance(judge, LexicalJudge):
        return judge
    if auto.explainer == "lexical":
        return LexicalJudge()
    if "explainer" not in run.held:
        run.held["explainer"] = _model(run.profile, auto.explainer, auto.explainer_model)
    explainer: Judge = run.held["explainer"]
    return explainer


def _model(profile: Profile, kind: str, model: str) -> Judge:
    if kind == "in-process":
        return InProcessJudge(model)
    from metasae_lib.interpret.judges.http import HttpJudge  # its client is slow to load

    return HttpJudge(profile.autointerp.url, model, profile.autointerp.parallel)


def answers_for(run: Run, judge: Judge, asking: int = 0) -> Answers:
    """A judge's answers, kept with their prompts in the run's artefacts: nothing is asked twice.

    asking: another number is another table, for a test-retest that must not remember. The lexical
    judge is asked anew each time: it takes no time, and prompts do not hold all that it looks at.
    """
    if isinstance(judge, LexicalJudge):
        return answers_of(judge)
    about = judge.identity | ({"asking": asking} if asking else {})
    return AskOnce(judge, run.artefact("answers", about).folder / "answers.sqlite").answers


def token_lists(made: Sequence[Material]) -> list[str | None]:
    """The lexical judge's explanations, as a judge that reads words gets them."""
    return [in_words(text) for text in explain(made, answers_of(LexicalJudge()))]


def explanations_of(run: Run, judge: Judge, made: Sequence[Material]) -> list[str | None]:
    """What the profile's explainer writes about features, as the judge reads it."""
    explainer = _explainer_of(run, judge)
    texts = explain(made, answers_for(run, explainer))
    return texts if explainer is judge else [in_words(text) for text in texts]


def against_lists(
    run: Run, contexts: Contexts, judge: Judge, features: Sequence[int], most: int = 200
) -> pd.DataFrame:
    """Sentences of the profile's explainer and token lists of the same features, both scored.

    Columns as `score`, and explainer (`sentence`, `list`); no rows where the explainer writes lists
    anyway. At most so many features.
    """
    made = materials(contexts, list(features)[:most], sampling_of(run.profile))
    if run.profile.autointerp.explainer == "lexical" or isinstance(judge, LexicalJudge):
        return score([], [], answers_for(run, judge)).assign(explainer="")
    given = {"sentence": explanations_of(run, judge, made), "list": token_lists(made)}
    frames = [
        score(made, texts, answers_for(run, judge)).assign(explainer=name)
        for name, texts in given.items()
    ]
    return pd.concat(frames, ignore_index=True)


def score_pairs(
    run: Run,
    contexts: Mapping[str, Contexts],
    asked: Mapping[str, pd.DataFrame],
    judges: Mapping[str, Judge],
) -> pd.DataFrame:
    """Explain and score the features of every judge's pairs, as the profile says.

    contexts: by arm. asked: pairs by judge, as of `choose_pairs`. Columns as `score`, and judge and
    arm: one row for each feature of each.
    """
    frames = []
    for name, pairs in asked.items():
        judge, answers = judges[name], answers_for(run, judges[name])
        features = pd.concat(
            pairs[[arm, side]].set_axis(["arm", "feature"], axis=1)
            for arm, side in (("base_arm", "base"), ("joint_arm", "joint"))
        ).drop_duplicates()
        for arm, mine in features.groupby("arm", sort=False):
            made = materials(contexts[str(arm)], mine.feature, sampling_of(run.profile))
            texts = explanations_of(run, judge, made)
            frames.append(score(made, texts, answers).assign(judge=name, arm=arm))
    return pd.concat(frames, ignore_index=True)
