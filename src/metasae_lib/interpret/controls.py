"""Controls that judge the judge: right, wrong and empty explanations, asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.judges.questions import Judge
from metasae_lib.interpret.material import (
    PLANTED,
    Material,
    Planted,
    materials,
    near_miss,
    planted,
)
from metasae_lib.interpret.scores import (
    CHANCE,
    SCORES,
    Answers,
    answers_for,
    explanations_of,
    sampling_of,
    score,
)
from metasae_lib.measure.statistics import Effect, paired_difference, smallest, wilson
from metasae_lib.study import MeasureError, Run
from metasae_lib.train import Arm

Ints = NDArray[np.int64]
Texts = dict[str, list[str | None]]


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


class Group(NamedTuple):
    """Features of one kind, and the explanations that each gets under some conditions."""

    made: Sequence[Material]
    given: Mapping[str, Sequence[str | None]]


def control_table(
    groups: Mapping[str, Group], answers: Answers, again: Answers | None = None
) -> pd.DataFrame:
    """What a judge makes of explanations that are known to be right or wrong.

    groups: `meaning` and `form` (planted features), and others. again: a second asking, which must
    not remember the first, for test-retest of the planted features. Columns as `score`, and group
    and condition (those of the groups, and `again`): one row a feature and condition.
    """
    frames = []
    for group, (made, given) in groups.items():
        if not made:
            continue
        scores = {name: score(made, texts, answers) for name, texts in given.items()}
        if again is not None and group in PLANTED:
            # In another order: what a judge says must not depend on what it was asked before.
            scores["again"] = score(made[::-1], given["right"][::-1], again)[::-1]
        frames += [frame.assign(group=group, condition=name) for name, frame in scores.items()]
    return pd.concat(frames, ignore_index=True)


def examine(
    run: Run, contexts: Contexts, arm: Arm, judge: Judge, features: int = 30
) -> pd.DataFrame:
    """`control_table` of a judge on one arm's text, and the column concept of planted features.

    Groups: planted features of `meaning` and of `form`, `blends` of two concepts, and `features` of
    the arm. Conditions: the explanation as the run's explainer writes it (`right`), the concept's
    name (`words`), that of what is most like it, a near miss or the feature with the nearest
    decoder row (`near`), of one concept of a blend (`half`), of any other (`shuffled`), or none
    (`empty`).
    """
    sampling, answers = sampling_of(run.profile), answers_for(run, judge)
    known, both = (planted(contexts, sampling, 3, blends) for blends in (False, True))
    texts = explanations_of(run, judge, [one.material for one in known])
    groups, of = planted_groups(known, texts), _by_concept(known, texts)
    made = [one.material for one in both]
    half = [of.get(one.concepts[0], one.concepts[0]) for one in both]
    groups["blends"] = Group(made, {"right": explanations_of(run, judge, made), "half": half})

    usable = contexts.usable(sampling.examples, sampling.examples)
    sample = np.random.default_rng(sampling.seed).permutation(usable)[:features]
    beside = usable[_nearest_rows(arm, sample, usable)]
    made, neighbours = (materials(contexts, which, sampling) for which in (sample, beside))
    right, near = (explanations_of(run, judge, each) for each in (made, neighbours))
    kept = [k for k, text in enumerate(right) if text is not None]
    given: Texts = {"right": [right[k] for k in kept], "near": [near[k] for k in kept]}
    groups["features"] = Group([made[k] for k in kept], _with_wrong(given))

    table = control_table(groups, answers, answers_for(run, judge, asking=1))
    names_of = {group: known for group in PLANTED} | {"blends": both}
    concepts = [
        " + ".join(names_of[group][feature].concepts) if group in names_of else ""
        for group, feature in zip(table.group, table.feature, strict=True)
    ]
    return table.assign(concept=concepts)


def planted_groups(known: Sequence[Planted], texts: Sequence[str | None]) -> dict[str, Group]:
    """Planted features of each kind under the conditions of `examine`. texts: their right
    explanations."""
    groups, of = {}, _by_concept(known, texts)
    for kind in PLANTED:
        mine = [(one, text) for one, text in zip(known, texts, strict=True) if one.kind == kind]
        names = [one.concepts[0] for one, _ in mine]
        near = [of.get(other, other) for other in map(near_miss, names)]
        given: Texts = {"right": [text for _, text in mine], "words": [*names], "near": near}
        groups[kind] = Group([one.material for one, _ in mine], _with_wrong(given))
    return groups


def _by_concept(known: Sequence[Planted], texts: Sequence[str | None]) -> dict[str, str | None]:
    """One explanation of each concept, its last copy's."""
    return {one.concepts[0]: text for one, text in zip(known, texts, strict=True)}


def _with_wrong(given: Texts) -> Texts:
    right = given["right"]
    return given | {"shuffled": shuffled(right), "empty": [""] * len(right)}


def _nearest_rows(arm: Arm, sample: Ints, usable: Ints) -> Ints:
    """Places in `usable` of the features whose decoder rows are nearest to each of the sample's."""
    rows = arm.sae.directions.detach().cpu().numpy()
    cosines = rows[sample] @ rows[usable].T
    cosines[sample[:, None] == usable] = -2
    return cosines.argmax(axis=1)


class Verdict(NamedTuple):
    """Whether a judge can be believed on one score, and what that rests on."""

    able: bool
    because: str


def judge_verdict(controls: pd.DataFrame, score_name: str, kind: str) -> Verdict:
    """Whether the judge tells a right explanation from a wrong one, on planted features of a kind.

    All of these, fixed beforehand: with the right explanation the score is above chance (95%
    interval of the mean); it is above that of the shuffled explanations (95% interval of the paired
    difference); at most a tenth of its answers cannot be read; it says "A" in 30% to 70% of the
    fuzzing rounds; asked again, its scores correlate by 0.8 or more. Raises MeasureError for an
    unknown score.
    """
    if score_name not in SCORES:
        raise MeasureError(f"there is no score '{score_name}': choose one of {', '.join(SCORES)}")
    by, chance = _by(controls), CHANCE[score_name]
    if (kind, "right") not in by:
        return Verdict(False, f"the text has too few words of {kind} to plant a feature")
    asked = by[kind, "right"]
    if asked[score_name].isna().all() and not asked.unreadable.any():
        return Verdict(
            False, "the planted features give it nothing to score, such as strengths that differ"
        )
    # Where a judge could not answer it has shown nothing: that is chance.
    right, wrong = (by[kind, k][score_name].fillna(chance) for k in ("right", "shuffled"))
    above, gain = _interval(right - chance)[1], _interval(right - wrong)
    unread = asked.unreadable.sum() / max(asked.asked.sum(), 1)
    first = asked.said_first.sum() / max(asked.fuzzed.sum(), 1)
    checks = [
        (above > 0, f"right explanations score {right.mean():.3f} (chance {chance:g})"),
        (gain[1] > 0, f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f}) against shuffled ones"),
        (unread <= 0.1, f"{unread:.0%} of the answers unreadable"),
        (0.3 <= first <= 0.7, f"says 'A' in {first:.0%} of the rounds"),
    ]
    if (kind, "again") in by:
        alike = _alike(by, kind, score_name)[0]
        checks.append((alike >= 0.8, f"asked again, correlation {alike:.2f}"))
    able = all(passed for passed, _ in checks)
    return Verdict(able, "; ".join(reason for passed, reason in checks if able or not passed))


def fineness(controls: pd.DataFrame, pairs: int, score_name: str = "fuzzing") -> dict[str, Effect]:
    """How fine a difference a judge sees, on planted features.

    `near`: the right explanation over that of a near miss. `blend`: a blend's right explanation
    under the mean of its two concepts' own. `half`: a blend's right explanation over that of one of
    its concepts. `smallest`: the difference of means over so many pairs that it shows in four tries
    of five, if pairs scatter as two of the arm's `features` do. Means with 95% intervals; nan where
    the text gave nothing to plant.
    """
    by = _by(controls)

    def scores(*place: str) -> pd.Series:
        return by[place].set_index("concept")[score_name] if place in by else pd.Series(dtype=float)

    def both(condition: str) -> pd.Series:
        return pd.concat([scores(kind, condition) for kind in PLANTED])

    right, blend = both("right"), scores("blends", "right")
    mean = right.groupby(level=0).mean()
    parts = [mean.reindex(str(name).split(" + ")).mean(skipna=False) for name in blend.index]
    spread = float(np.sqrt(2) * scores("features", "right").std())
    least = smallest(spread, max(pairs, 1))
    return {
        "near": _effect(pd.Series(right.to_numpy() - both("near").to_numpy())),
        "blend": _effect(blend - np.array(parts)),
        "half": _effect(pd.Series(blend.to_numpy() - scores("blends", "half").to_numpy())),
        "smallest": Effect(least, np.nan, np.nan, spread),
    }


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
    for kind in PLANTED:
        if (kind, "again") in by:
            rows += [(kind, name, "asked again", *_alike(by, kind, name), 0.0) for name in SCORES]
    columns = ["group", "condition", "score", "mean", "low", "high", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


def _by(controls: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    """The controls of each group and condition, in the order in which they were made."""
    groups = controls.groupby(["group", "condition"], sort=False)
    return {place: frame.reset_index(drop=True) for place, frame in groups}


def _alike(
    by: Mapping[Any, pd.DataFrame], kind: str, score_name: str
) -> tuple[float, float, float, int]:
    """Correlation of two askings with its 95% interval, and of how many scores: 1 where all are
    equal, nan where there is none."""
    frames = [by[kind, when][score_name] for when in ("right", "again")]
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
    return astuple(_effect(values))[:3]


def _effect(values: pd.Series) -> Effect:
    found = values.dropna()
    return Effect(np.nan, np.nan, np.nan) if found.empty else paired_difference(found)


def verdict_table(controls: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every judge's verdict on every score, on meaning and on form. controls: by judge.

    Columns: judge, score, on, able, because.
    """
    rows = [
        (judge, name, kind, *judge_verdict(frame, name, kind))
        for judge, frame in controls.items()
        for name in SCORES
        for kind in PLANTED
    ]
    return pd.DataFrame(rows, columns=["judge", "score", "on", "able", "because"])


def is_able(verdicts: pd.DataFrame, judge: str, score_name: str = "fuzzing") -> bool:
    """Whether a judge passed on meaning and on form."""
    mine = verdicts[(verdicts.judge == judge) & (verdicts.score == score_name)]
    return bool(mine.able.all())


def first_lines(verdicts: pd.DataFrame, fine: Mapping[str, Effect], judge: str, pairs: int) -> str:
    """What a page has to say before anything else about the judge that its results rest on."""
    mine = verdicts[(verdicts.judge == judge) & (verdicts.score == "fuzzing")]
    word = "able" if is_able(verdicts, judge) else "unable"
    why = ". ".join(f"On {row.on}: {row.because}" for row in mine.itertuples())
    line = f"**The {judge} judge is {word} to judge by fuzzing.** {why}."
    if word == "unable":
        line += " So its fuzzing scores below say nothing about the dictionaries."
    others = [
        f"{name}: {'able' if is_able(verdicts, judge, name) else 'unable'}" for name in SCORES[1:]
    ]
    shown = {
        name: f"{e.difference:+.3f} ({e.low:+.3f} to {e.high:+.3f})".replace("-", "−")
        for name, e in fine.items()
    }
    return (
        f"{line} By its other scores ({', '.join(others)}).\n\n"
        f"**How fine a difference it sees** (means of fuzzing with 95% intervals). The right "
        f"explanation against that of a near miss: {shown['near']}. A blend of two concepts "
        f"against the mean of the two: {shown['blend']}; explained by both against by one of "
        f"them: {shown['half']}. Over {pairs:,} pairs the smallest difference that it shows in "
        f"four tries of five is **{fine['smallest'].difference:.4f}** if pairs scatter as two "
        f"features of the solo arm do; the paper's difference is 0.0175."
    )
