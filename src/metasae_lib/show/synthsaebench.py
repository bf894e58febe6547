"""SynthSAEBench on a page: ours beside the published values, pairs at equal L2, and in words."""

from __future__ import annotations

from typing import Any

import pandas as pd
import yaml

from metasae_lib.measure.synthsaebench import MEASURES, settings
from metasae_lib.show.text import between, enumerated, number, signed
from metasae_lib.study import PublishedError, repository_folders

_NAMES = dict(zip(MEASURES, ("F1", "MCC", "uniqueness", "variance explained"), strict=True))


def synthsaebench_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Every setting with mean and deviation over its seeds, then the published values.

    scores: of `measure.synthsaebench.scores`.
    """
    rows = []
    for setting, same in scores.groupby(settings(scores), sort=False):
        row = {"arm": setting, "seeds": str(len(same)), "samples": same.samples.iloc[0]}
        shown = {name: _spread(same[key].mean(), same[key].std()) for key, name in _NAMES.items()}
        means = {"L2": same.l2.mean(), "L0": same.l0.mean(), "dead": same.dead.mean()}
        rows.append(row | shown | means)
    published = _published()
    for value in published["values"]:
        row = {"arm": f"{value['arm']}, published", "seeds": None, "samples": published["samples"]}
        shown = {name: _spread(*value[key]) for key, name in _NAMES.items()}
        rows.append(row | shown | {"L2": None, "L0": value["l0"], "dead": None})
    return pd.DataFrame(rows)


def synthsaebench_pairs(changes: pd.DataFrame) -> pd.DataFrame:
    """`measure.synthsaebench.differences` for reading: a row a comparison, a column a measure."""
    rows = []
    for (setting, against), same in changes.groupby(["setting", "against"], sort=False):
        row = {"arm": setting, "against": against, "pairs": same.n_seeds.iloc[0]}
        shown = {_NAMES[str(one.measure)]: _change(one) for one in same.itertuples()}
        rows.append(row | shown)
    return pd.DataFrame(rows, columns=["arm", "against", "pairs", *_NAMES.values()])


def synthsaebench_sentences(scores: pd.DataFrame, changes: pd.DataFrame) -> list[str]:
    """Whether the penalty recovers more atoms, and at how many samples that is said."""
    joint = changes[changes.kind == "joint"]
    if joint.empty:
        return ["No run of it is kept in `results/`: make book PROFILES=synthsaebench makes one."]
    sentences = []
    for against, words in (("solo", "Against its solo partner"), ("equal L2", "At equal L2")):
        same = joint[joint.against == against]
        f1, mcc = (same[same.measure == measure].iloc[0] for measure in ("f1", "mcc"))
        if not f1.n_seeds:
            sentences.append(f"{words} there is nothing to compare: its L2 is beyond the frontier.")
            continue
        said = f"F1 by {_change(f1)} and MCC by {_change(mcc)}"
        sentences.append(f"{words} a joint dictionary changes {said}: {_verdict(mcc)}.")
    rivals = scores[scores.kind == "frontier"]
    dead = rivals.groupby(settings(rivals)).dead.mean()
    if (dead > 0).any():
        found = enumerated(f"{number(count)} in {name}" for name, count in dead[dead > 0].items())
        sentences.append(
            f"Solo dictionaries of smaller k have dead features ({found}): at equal L2 the rival "
            "is in part a smaller dictionary."
        )
    ours, theirs = scores.samples.iloc[0], _published()["samples"]
    return [
        *sentences,
        f"Ours saw {ours:,} samples, the published ones {theirs:,}: {number(theirs / ours)} times "
        "as many. Differences between arms of one training can be read, levels beside the "
        "published ones only with that in mind.",
    ]


def _verdict(mcc: Any) -> str:
    if mcc.low > 0:
        return "its features are **nearer** to atoms"
    if mcc.high < 0:
        return "its features are **further** from atoms"
    return "whether its features are nearer to atoms, its interval leaves open"


def _change(row: Any) -> str:
    if pd.isna(row.difference):
        return "—"
    ends = "" if pd.isna(row.low) else f" ({between(row.low, row.high, signed)})"
    return f"{signed(row.difference)}{ends}"


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.4f}" if pd.isna(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def _published() -> dict[str, Any]:
    """`book/synthsaebench.yml`. Raises `PublishedError` if it is not there."""
    for folder in repository_folders("book"):
        if (path := folder / "synthsaebench.yml").is_file():
            values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            return values
    raise PublishedError(
        "book/synthsaebench.yml is not in this folder or above: run from inside the repository."
    )
