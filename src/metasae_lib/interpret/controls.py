"""Controls that judge the judge: right, wrong and empty explanations, asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    plan_of,
    score,
)
from metasae_lib.measure.statistics import paired_difference, wilson
from metasae_lib.study.errors import MeasureError
from metasae_lib.study.run import Run


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
