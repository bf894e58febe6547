"""The claims that the reference runs judge, announced before they are made: book/claims.yml.

Each is one change with its interval, out of a table of its run. Beside it stands how far that
interval is expected to reach, from the scatter of a smaller run that was there before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from citation import Citation
from landing import kept_mark
from metasae_lib import Profile, Run
from metasae_lib.measure import paired_measures
from metasae_lib.measure.statistics import expected_reach
from metasae_lib.show.text import number, table
from metasae_lib.study.kept import KeptRun

FOR, AGAINST, OPEN = "for it", "against it", "open"
NOTHING, NOT_MADE = "nothing to compare with", "not made yet"
ANSWERS = FOR, AGAINST, OPEN, NOTHING
LACKING = (math.nan, math.nan, math.nan, 0)  # for a row that a finished run does not have


def page(
    announced: Mapping[str, Any],
    profiles: Mapping[str, Profile],
    runs: Mapping[str, Run],
    where: Citation,
) -> str:
    """The announcement and, for runs that were made since, its verdicts.

    announced: `book/claims.yml`. profiles: of the runs that it names. runs: by name, fresh or kept.
    """
    parts = [_when(announced["announced"], where)]
    there = made(profiles, runs)
    for name, section in announced["runs"].items():
        run, seen_in = runs[name] if name in there else None, runs.get(section["seen_in"])
        seeds = len(profiles[name].training.seeds)
        rows = [_row(claim, run, seen_in, seeds) for claim in section["claims"]]
        later = f" {_when(section['announced'], where)}" if "announced" in section else ""
        when = f"{later} Made: {kept_mark(run)}." if isinstance(run, KeptRun) else later
        seen = f" What it will see is told from `{section['seen_in']}`." if seen_in else ""
        caption = f"Claims that {name} judges"
        shown = table(pd.DataFrame(rows), caption, f"tab-announced-{name}")
        parts += [f"## {name}", f"{seeds} seeds.{seen}{when}", shown.data]
    return "\n\n".join(parts)


def _when(announced: Mapping[str, Any], where: Citation) -> str:
    if not announced.get("commit"):
        return "Not announced yet: until a commit is named here, this list may change."
    file = where.file("book/claims.yml", announced["commit"])
    return f"Announced on {announced['date']}, in {file}."


def made(profiles: Mapping[str, Profile], runs: Mapping[str, Run]) -> list[str]:
    """The runs that are there just as announced, with every size."""
    return [name for name, profile in profiles.items()
            if name in runs and runs[name].profile_hash == profile.hash]  # fmt: skip


def answered_for(announcement: Mapping[str, Any], made: Collection[str]) -> set[str]:
    """The runs in whose place one that was made speaks: a larger one, or one with more arms."""
    parts = [announcement["runs"][name] for name in made]
    smaller = {part["seen_in"] for part in parts} - set(made)
    return smaller | {part["repeats"] for part in parts if "repeats" in part}


def _row(
    claim: Mapping[str, Any], run: Run | None, seen_in: Run | None, seeds: int
) -> dict[str, str]:
    before = None if seen_in is None else found(seen_in, claim)
    reach = "—"
    if before is not None and not math.isnan(half := expected_reach(*before[1:], seeds)):
        reach = f"± {number(half, 2)}"
    value, answer = "—", NOT_MADE
    if run is not None:
        change, low, high, _ = found(run, claim) or LACKING
        if not math.isnan(change):
            value = f"{number(change)} ({number(low)} to {number(high)})"
        answer = judged(claim["says"], low, high)
    return {
        "what changes": claim["what"], "against": claim["against"],
        "the claim": claim["says"], "interval will reach": reach,
        "found": value, "speaks": answer,
    }  # fmt: skip


def found(run: Run, claim: Mapping[str, Any]) -> tuple[float, float, float, int] | None:
    """A claim's change with the ends of its interval and its seeds; None where a run lacks it."""
    if not run.has_table(claim["table"]):
        return None
    frame = run.load_table(claim["table"])
    if "paired" in claim:
        frame = paired_measures(run, frame, [claim["paired"]])
    for column, value in claim["row"].items():
        frame = frame[frame[column] == value]
    if frame.empty:
        return None
    (row,) = frame.to_dict("records")
    change, low, high = (float(row[column]) for column in claim["value"])
    return change, low, high, int(row["n_seeds"])


def judged(says: str, low: float, high: float) -> str:
    """Which way an interval speaks on a claim that says `lower` or `higher` than zero."""
    if math.isnan(low):
        return NOTHING
    if not (low > 0 or high < 0):
        return OPEN
    return FOR if (high < 0) == (says == "lower") else AGAINST
