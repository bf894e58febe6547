"""Controls that judge the judge: right, wrong and empty explanations, asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.judges.questions import Judge
from metasae_lib.interpret.material import Material, materials, planted
from metasae_lib.interpret.scores import (
    CHANCE,
    SCORES,
    Answers,
    answers_for,
    explain,
    explanations_of,
    sampling_of,
    score,
)
from metasae_lib.measure.statistics import paired_difference, wilson
from metasae_lib.study import MeasureError, Run


def shuffled(explanations: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """Every explanation given to another feature, with another text where there is one."""
    order = np.random.default_rng(seed).permutation(len(explanations))
    texts = [explanations[place] for place in order]
    n = len(texts)
    differs = (k for k in range(1, n) if all(texts[i] != texts[i - k] for i in range(n)))
    shift = next(differs, n // 2)
    given: list[str | None] = [None] * n
    for i, place in enumerate(order):
        given[place] = texts[i - shift]
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
        subjects, right = map(list, zip(*made, strict=True))
        given = {"right": right, "shuffled": shuffled(right), "empty": [""] * len(right)}
        scores = {name: score(subjects, texts, answers) for name, texts in given.items()}
        if again is not None and group == "planted":
            # In another order: what a judge says must not depend on what it was asked before.
            scores["again"] = score(subjects[::-1], right[::-1], again)[::-1]
        frames += [frame.assign(group=group, condition=name) for name, frame in scores.items()]
    return pd.concat(frames, ignore_index=True)


def examine(run: Run, contexts: Contexts, judge: Judge, features: int = 30) -> pd.DataFrame:
    """`control_table` of a judge on one arm's text: planted features, and some of its own.

    The lexical judge cannot read sentences, so it explains the planted features itself.
    """
    sampling, answers = sampling_of(run.profile), answers_for(run, judge)
    known = planted(contexts, sampling, copies=3)
    if isinstance(judge, LexicalJudge):
        own_words = explain([material for material, _ in known], answers)
        known = [(m, text or "") for (m, _), text in zip(known, own_words, strict=True)]
    usable = contexts.usable(sampling.examples, sampling.examples)
    sample = np.random.default_rng(sampling.seed).permutation(usable)[:features]
    made = materials(contexts, sample, sampling)
    texts = explanations_of(run.profile, judge, made, answers)
    own = [(m, text) for m, text in zip(made, texts, strict=True) if text is not None]
    return control_table(known, own, answers, answers_for(run, judge, asking=1))


class Verdict(NamedTuple):
    """Whether a judge can be believed on one score, and what that rests on."""

    able: bool
    because: str


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
    by, chance = _by(controls), CHANCE[score_name]
    asked = by["planted", "right"]
    if asked[score_name].isna().all() and not asked.unreadable.any():
        return Verdict(
            False, "the planted features give it nothing to score, such as strengths that differ"
        )
    # Where a judge could not answer it has shown nothing: that is chance.
    right, wrong = (by["planted", k][score_name].fillna(chance) for k in ("right", "shuffled"))
    above, gain = _interval(right - chance)[1], _interval(right - wrong)
    unread = asked.unreadable.sum() / max(asked.asked.sum(), 1)
    first = asked.said_first.sum() / max(asked.fuzzed.sum(), 1)
    checks = [
        (above > 0, f"right explanations score {right.mean():.3f} (chance {chance:g})"),
        (gain[1] > 0, f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f}) against shuffled ones"),
        (unread <= 0.1, f"{unread:.0%} of the answers unreadable"),
        (0.3 <= first <= 0.7, f"says 'A' in {first:.0%} of the rounds"),
    ]
    if ("planted", "again") in by:
        alike = _alike(by, score_name)[0]
        checks.append((alike >= 0.8, f"asked again, correlation {alike:.2f}"))
    able = all(passed for passed, _ in checks)
    return Verdict(able, "; ".join(reason for passed, reason in checks if able or not passed))


def control_summary(controls: pd.DataFrame) -> pd.DataFrame:
    """Every control as a mean with its 95% interval, and `n`, what it is the mean of.

    Columns: group, condition, score, mean, low, high, n, chance. Besides the three scores, by group
    and condition, `score` is `order bias` (share of "A" among the fuzzing answers; the real text
    stands first in half of the rounds) or `asked again` (of planted features, with the score's
    name as condition: correlation of their scores between two askings, 1 where all are equal).
    """
    rows: list[tuple[Any, ...]] = []
    by = _by(controls)
    for place, frame in by.items():
        for name in SCORES:
            n = int(frame[name].notna().sum())
            rows.append((*place, name, *_interval(frame[name]), n, CHANCE[name]))
        if rounds := int(frame.fuzzed.sum()):
            first = int(frame.said_first.sum())
            share = (first / rounds, *wilson(first, rounds))
            rows.append((*place, "order bias", *share, rounds, 0.5))
    if ("planted", "again") in by:
        rows += [("planted", name, "asked again", *_alike(by, name), 0.0) for name in SCORES]
    columns = ["group", "condition", "score", "mean", "low", "high", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


def _by(controls: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    """The controls of each group and condition, in the order in which they were made."""
    groups = controls.groupby(["group", "condition"], sort=False)
    return {place: frame.reset_index(drop=True) for place, frame in groups}


def _alike(by: Mapping[Any, pd.DataFrame], score_name: str) -> tuple[float, float, float, int]:
    """Correlation of two askings with its 95% interval, and of how many scores: 1 where all are
    equal, nan where there is none."""
    frames = [by["planted", when][score_name] for when in ("right", "again")]
    once, again = pd.concat(frames, axis=1).dropna().to_numpy().T
    if len(once) and (once == again).all():
        return 1.0, 1.0, 1.0, len(once)
    if len(once) < 4 or np.ptp(once) == 0 or np.ptp(again) == 0:
        return np.nan, np.nan, np.nan, len(once)
    found = scipy.stats.pearsonr(once, again)
    low, high = found.confidence_interval()
    return float(found.statistic), float(low), float(high), len(once)


def _interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean and 95% interval, nan where there is nothing to average."""
    found = values.dropna()
    return (np.nan, np.nan, np.nan) if found.empty else astuple(paired_difference(found))[:3]


def verdict_table(controls: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every judge's verdict on every score. controls: `control_table` by judge.

    Columns: judge, score, able, because.
    """
    rows = [
        (judge, name, *judge_verdict(frame, name))
        for judge, frame in controls.items()
        for name in SCORES
    ]
    return pd.DataFrame(rows, columns=["judge", "score", "able", "because"])


def first_line(verdicts: pd.DataFrame, judge: str) -> str:
    """What a page has to say before anything else about the judge that its results rest on."""
    mine = verdicts[verdicts.judge == judge].set_index("score")
    able = mine.able.map({True: "able", False: "unable"})
    line = f"**The {judge} judge is {able.fuzzing} to judge by fuzzing**: {mine.because.fuzzing}."
    if not mine.able.fuzzing:
        line += " So its fuzzing scores below say nothing about the dictionaries."
    others = [f"{name}: {able[name]}" for name in SCORES[1:]]
    return f"{line} By its other scores ({', '.join(others)})."
