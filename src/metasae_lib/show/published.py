"""The paper's printed values, and what a measurement of ours says about each of them.

`load_published` flattens `book/published.yml` into one row a value. `verdict` is the one rule by
which a number agrees or not; `scorecard` applies it to every row. Nothing here touches a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from metasae_lib.measure.statistics import Effect, seeds_interval
from metasae_lib.study import PublishedError, repository_folders

AGREES = "agrees"
SAME_DIRECTION = "same direction, different size"
DISAGREES = "disagrees"
INCONCLUSIVE = "inconclusive"
NOT_RUN = "not run"
OTHER_MODEL = "other model: not comparable"
AS_SET = "as in the paper"
SET_OTHERWISE = "set otherwise"
NOT_PRINTED = "not printed"
MADE = "made"
#: The verdicts that answer the paper, from good to bad; the order of every table and figure.
COMPARED = (AGREES, SAME_DIRECTION, INCONCLUSIVE, DISAGREES)
RESULTS = ("result", "table 1", "case study")  # sections of what the paper found, not of its set-up


@dataclass(frozen=True)
class PublishedValue:
    """One value of the paper.

    `value` is the number, or None for words, lists and blank cells; `printed` is what stands in the
    file; `rounding` is half a unit of the last printed digit. `transfers` says that the value is a
    comparison between two dictionaries of one model (a change, a share, a test), so that another
    model's can be held against it; `null` is the value that would mean "no effect" (None where a
    value has no direction).
    """

    id: str
    model: str
    section: str
    what: str
    where: str
    unit: str
    printed: str
    value: float | None
    rounding: float
    tolerance: float
    tolerance_origin: str
    transfers: bool
    null: float | None
    note: str = ""


@dataclass(frozen=True)
class Published:
    """Every printed value by id, in the file's order."""

    values: dict[str, PublishedValue] = field(default_factory=dict)

    def __getitem__(self, value_id: str) -> float:
        """The number printed under an id; PublishedError for words or an unknown id."""
        if value_id not in self.values:
            raise PublishedError(f"published.yml has no value {value_id!r}.")
        number = self.values[value_id].value
        if number is None:
            raise PublishedError(f"{value_id} is printed in words, not as a number.")
        return number

    def frame(self) -> pd.DataFrame:
        """One row a value, columns as in `PublishedValue`."""
        return pd.DataFrame([vars(v) for v in self.values.values()])


@dataclass(frozen=True)
class Measured:
    """What we have for one published value: a number and its interval, or words, or why neither.

    `scatter`: deviation of one pair of arms, where the value is a mean over pairs. `answer` is the
    verdict on a claim printed in words, drawn from numbers by the caller; numbers get theirs from
    `verdict` alone.
    """

    value: float | None = None
    interval: tuple[float, float] | None = None
    words: str = ""
    scatter: float = math.nan
    answer: str = ""
    why_not: str = ""


# What each part of a key means to a reader.
_WORDS = {
    "d": "Δ", "l2": "L2", "ce": "CE", "phi": "φ", "lambda2": "λ₂", "lambda0": "λ₂ = 0",
    "lambda1": "λ₂ = 1", "sigma": "σ", "mean_abs_phi": "mean |φ|", "n": "number of",
    "fuzz": "fuzzing", "welch": "Welch", "sigma_sq": "σ²", "jumprelu": "JumpReLU",
    "d_model": "width d", "l2_over_norm": "L2 / norm", "l2_increase": "L2 increase",
    "table": "(caption)",
}  # fmt: skip
_UNITS = {"pct": "%", "nats": "nats", "points": "percentage points", "tokens": "tokens"}
# Comparisons of two dictionaries of one model: what can be expected to transfer. Everything else is
# a quantity of one model, layer and text, which another model's need not equal.
_RELATIVE = {
    "d_mean_abs_phi_pct", "d_l2_pct", "d_l2_pct_selected", "joint_minus_solo_ce_points",
    "fuzz_paired_delta", "fuzz_delta_pct", "fuzz_delta_pct_selected", "fuzz_joint_higher_pct",
    "lambda0_control", "lambda1_failure", "selected",
}  # fmt: skip
_OVERHEAD = 0.1, "it prints its own solo overhead as 2.5% and as 2.4%"
_T = "twice the standard error that its t of 8.12 implies (§5.2)"
# How far ours may lie from a printed value and where that distance comes from, by its key: the
# first pattern that fits. Without one it is the rounding of the printed value.
_TOLERANCES = {
    # Two dictionaries, each scattering by 1e-5 around 2.15e-3; twice the standard deviation.
    "d_mean_abs_phi_pct": (
        2 * math.sqrt(2) * 1e-5 / 2.15e-3 * 100,
        "twice the scatter of a difference of two of its four seeds (§5.1)",
    ),
    "d_l2_pct*": (1.0, "its own 0.010 / 0.097 is 10.3% where it prints 9.3% (§5.3)"),
    "*ce_*pct*": _OVERHEAD,
    "*ce_points": _OVERHEAD,
    "fuzz_*_mean": (2 * 0.0175 / 8.12, _T),
    "fuzz_paired_delta": (2 * 0.0175 / 8.12, _T),
    "fuzz_delta_pct*": (2 * 7.6 / 8.12, _T),
    "*_higher_pct": (100 / math.sqrt(20456), "twice the binomial standard error of 20,456 pairs"),
    "solo_mean_abs_phi": (1.2e-4, "it prints 2.27e-3 and, for four other seeds, 2.15e-3 (§5.1)"),
    "independent_solo_mean*": (2e-5, "twice the scatter that it prints for its four seeds (§5.1)"),
}


def _number(text: str) -> tuple[float | None, float]:
    """A printed number and half a unit of its last digit; None and 0 for words.

    Trailing zeros of an integer are not digits ("~209M"), nor is the ".0" that YAML wants before an
    exponent (the paper prints 3 × 10⁻⁴, not 3.0 × 10⁻⁴).
    """
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None, 0.0
    digits = number.normalize() if "." not in text or ".0e" in text.lower() else number
    return float(number), 0.5 * 10.0 ** int(digits.as_tuple().exponent)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{_WORDS.get(k, k)} {_words(v)}" for k, v in value.items())
    return "—" if value == "null" else str(value)


def _label(key: str) -> str:
    """A key in a reader's words, without its unit."""
    parts = "|".join(sorted(_WORDS, key=len, reverse=True))
    text = re.sub(rf"(?<![^_])({parts})(?![^_])", lambda part: _WORDS[part[0]], key)
    return " ".join(part for part in text.split("_") if part == "tokens" or part not in _UNITS)


def _value(
    value_id: str, section: str, where: str, value: Any, what: str = "", note: str = ""
) -> PublishedValue:
    key, printed = value_id.rpartition(".")[2], _words(value)
    model = "gemma-2-9b" if "gemma" in value_id else "gpt2-large"
    number, rounding = _number(printed)
    rounded = rounding, "rounding of the printed value"
    tolerance = next((t for glob, t in _TOLERANCES.items() if fnmatch(key, glob)), rounded)
    if section == "set-up":
        tolerance = 0.0, "a setting is the same or it is not"
    unit = next((u for part, u in _UNITS.items() if part in key.split("_")), "1")
    transfers = section in ("result", "table 1") and key in _RELATIVE
    null = (50.0 if key == "fuzz_joint_higher_pct" else 0.0) if transfers else None
    return PublishedValue(
        value_id, model, section, what or _label(key), where, unit, printed, number, rounding,
        *tolerance, transfers, null, note,
    )  # fmt: skip


def _flatten(tree: dict[str, Any]) -> Iterator[PublishedValue]:
    """`published.yml` (every scalar still as text) → its values, one by one."""
    for model, settings in tree["setup"].items():
        for key, entry in settings.items():
            yield _value(f"{model}.setup.{key}", "set-up", **entry)
    for model in tree["setup"]:
        for key, entry in tree[model].items():
            if "rows" not in entry:
                yield _value(f"{model}.{key}", "result", **entry)
            for row in entry.get("rows", []):
                stem = f"{model}.{key}.{grid_id(float(row['lambda2']), float(row['sigma_sq']))}"
                note = "selected by the paper" if "selected" in row else ""
                for column in ("d_mean_abs_phi_pct", "d_l2_pct", "ce_pct"):
                    name = "CE overhead" if column == "ce_pct" else _label(column)
                    what = f"{name} at λ₂ {row['lambda2']}, σ² {row['sigma_sq']}"
                    at = f"{stem}.{column}"
                    yield _value(at, "table 1", entry["where"], row[column], what, note)
    for case in tree["case_studies"]:
        for feature in case["features"]:
            stem = f"{case['model']}.case.{case['word']}.{feature['sae']}-{feature['id']}"
            for key, name in (("fuzz", "fuzzing score"), ("phi", "|φ| with the solo feature")):
                if key in feature:
                    what = f"“{case['word']}”, {feature['sae']} feature {feature['id']}: {name}"
                    yield _value(f"{stem}.{key}", "case study", case["where"], feature[key], what,
                                 feature["sense"])  # fmt: skip
    for artefact in tree["artefacts"]:
        at, what = f"artefact.{artefact['id']}", artefact["id"].replace("-", " ")
        yield _value(at, "artefact", artefact["where"], artefact["what"], what)


def grid_id(lambda2: Any, sigma_sq: Any) -> str:
    """How ids name a point of the grid: `lambda0.3-sigma1`."""
    return f"lambda{lambda2:g}-sigma{sigma_sq:g}"


def load_published(path: str | Path | None = None) -> Published:
    """Every value of `published.yml` with where it is printed.

    Without a path: `book/published.yml` of the repository that holds the working directory or the
    package. PublishedError if the file is not there or is not this file.
    """
    if path is None:
        files = (folder / "published.yml" for folder in repository_folders("book"))
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise PublishedError(
                "book/published.yml is not in this folder or above: run from inside the repository,"
                " or pass its path."
            )
    try:
        # BaseLoader leaves every scalar as text: 2.0 and 2 differ in the digits printed.
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        return Published({v.id: v for v in _flatten(tree)})
    except OSError as error:
        raise PublishedError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise PublishedError(f"{path} is not the paper's value file ({error}).") from error


def verdict(
    published: float,
    ours: float | None,
    interval: tuple[float, float] | None,
    tolerance: float,
    null: float | None = 0.0,
) -> str:
    """What our value with its interval says about a published one.

    Let A = [published - tolerance, published + tolerance], ends included, and I = interval (the
    point itself without one). `null` is the value that means "no effect"; a published value within
    `tolerance` of it claims no effect; with `null=None` a value has no direction. In this order:

    1. ours is None or not finite: **not run**.
    2. I and A do not meet: **same direction, different size** if the published value claims an
       effect, and I lies wholly on its side of `null`; otherwise **disagrees**.
    3. ours is in A, and
       - there is no direction, or
       - the published value claims an effect and I excludes `null`, or
       - the published value claims no effect and I lies wholly inside A: **agrees**.
    4. Everything else (the interval reaches the published value but ours does not, or ours does but
       cannot be told from no effect): **inconclusive**.

    An interval that does not hold ours, or a negative tolerance, is a PublishedError.
    """
    if tolerance < 0 or math.isnan(tolerance):
        raise PublishedError(f"A tolerance is zero or more, not {tolerance}.")
    if ours is None or not math.isfinite(ours):
        return NOT_RUN
    low, high = interval or (ours, ours)
    slack = 1e-9 * (abs(published) + tolerance)  # a printed 2.55 is at the end of 2.5 ± 0.05
    if not low - slack <= ours <= high + slack:
        raise PublishedError(f"The interval ({low}, {high}) does not hold its value {ours}.")
    bottom, top = published - tolerance - slack, published + tolerance + slack
    zero = null or 0.0
    effect = null is not None and abs(published - zero) > tolerance + slack
    if high < bottom or low > top:
        same_side = effect and (low > zero if published > zero else high < zero)
        return SAME_DIRECTION if same_side else DISAGREES
    told = (high < zero or low > zero) if effect else (bottom <= low and high <= top)
    return AGREES if bottom <= ours <= top and (null is None or told) else INCONCLUSIVE


def seeds_to_decide(value: PublishedValue, ours: Measured, factor: float = 1.0) -> float:
    """How many seeds would end an inconclusive verdict, if ours stayed where it is.

    nan where it is not inconclusive, or where a thousand would not do.
    """
    published = value.value
    if published is None or ours.value is None or not ours.scatter > 0:
        return math.nan

    def undecided(interval: tuple[float, float] | None) -> bool:
        found = verdict(published, ours.value, interval, factor * value.tolerance, value.null)
        return found == INCONCLUSIVE

    if not undecided(ours.interval):
        return math.nan
    effect = Effect(ours.value, math.nan, math.nan, ours.scatter)
    return next((n for n in range(2, 1001) if not undecided(seeds_interval(effect, n))), math.nan)


def _judge(value: PublishedValue, ours: Measured, model: str, factor: float) -> str:
    if value.printed == "—":
        return NOT_PRINTED
    if ours.value is None and not ours.words:
        return f"{NOT_RUN}: {ours.why_not or 'nothing measures it in this run'}"
    if value.section == "set-up":
        same = ours.words == value.printed if ours.words else ours.value == value.value
        return AS_SET if same else SET_OTHERWISE
    if value.section == "artefact":
        return MADE
    if value.value is None:
        return ours.answer or INCONCLUSIVE
    if model != value.model and not value.transfers:
        return OTHER_MODEL
    if value.id.endswith("_below") and ours.value is not None:
        return AGREES if ours.value <= value.value else DISAGREES  # printed as a bound
    return verdict(value.value, ours.value, ours.interval, factor * value.tolerance, value.null)


def scorecard(
    published: Published, ours: Mapping[str, Measured], model: str, factor: float = 1.0
) -> pd.DataFrame:
    """Every published value, ours, and the verdict: one row each, none left out.

    `ours` by id of the published value, whatever model it was measured on; `model` is the profile's
    name. On a model other than the row's, ours is the analogous quantity: the row is judged where
    it compares two dictionaries of one model (`transfers`), and is `other model: not comparable`
    where it is an absolute value. `factor` scales every tolerance. Columns: id, section, model,
    what, where, unit, published, ours, low, high, difference, tolerance, origin, verdict, group
    (the verdict without its reason), seeds (`seeds_to_decide`).
    """
    unknown = sorted(set(ours) - set(published.values))
    if unknown:
        raise PublishedError(f"published.yml has no value {unknown[0]!r}.")
    card = published.frame().rename(columns={"printed": "published", "tolerance_origin": "origin"})
    both = [(value, ours.get(value.id, Measured())) for value in published.values.values()]
    card["ours"] = [mine.words or mine.value for _, mine in both]
    card[["low", "high"]] = [mine.interval or (None, None) for _, mine in both]
    card["difference"] = [
        None if mine.value is None or value.value is None else mine.value - value.value
        for value, mine in both
    ]
    card["tolerance"] *= factor
    card["verdict"] = [_judge(value, mine, model, factor) for value, mine in both]
    card["seeds"] = [
        seeds_to_decide(value, mine, factor) if found == INCONCLUSIVE else math.nan
        for (value, mine), found in zip(both, card.verdict, strict=True)
    ]
    card["group"] = [NOT_RUN if v.startswith(NOT_RUN) else v for v in card.verdict]
    columns = ["id", "section", "model", "what", "where", "unit", "published", "ours"]
    columns += ["low", "high", "difference", "tolerance", "origin", "verdict", "group", "seeds"]
    return card[columns]


def verdict_counts(published: Published, ours: Mapping[str, Measured], model: str) -> pd.DataFrame:
    """How many results get each verdict at half, once and twice the tolerances.

    Rows: the verdicts that occur; columns: the factors. Settings and artefacts have no tolerance
    and are left out.
    """
    counts = {}
    for factor in (0.5, 1, 2):
        card = scorecard(published, ours, model, factor)
        counts[f"{factor} × tolerance"] = card[card.section.isin(RESULTS)].group.value_counts()
    frame = pd.DataFrame(counts).fillna(0).astype(int)
    order = [g for g in (*COMPARED, OTHER_MODEL, NOT_RUN, NOT_PRINTED) if g in frame.index]
    return frame.loc[order].rename_axis("verdict").reset_index()
