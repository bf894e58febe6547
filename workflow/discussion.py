"""What the announced runs say together: book/discussion.md, put together from their tables.

Which way a sentence is worded follows from its interval. Where a run is not there yet, the smaller
one that it was announced from speaks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, permutations
from operator import itemgetter
from typing import Any

import pandas as pd

import announced
from metasae_lib import Profile, Run
from metasae_lib.interpret import splitting
from metasae_lib.measure import paired_measures, setting_table
from metasae_lib.measure.statistics import expected_reach
from metasae_lib.show import (
    elasticity_sentence,
    load_published,
    scale_of_run,
    scorecard_sentence,
    synthsaebench_sentences,
)
from metasae_lib.show.published import grid_id
from metasae_lib.show.scorecard import saved_scorecard
from metasae_lib.show.sentences import (
    effects_by_way,
    moves,
    recovery_rank,
    with_ends,
)
from metasae_lib.show.text import enumerated, number, percent, signed
from metasae_lib.study import COMPETITORS
from metasae_lib.study.plan import hours

_CHANGE, _PHI = ("change_pct", "low", "high"), ["d_mean_abs_phi_pct", "low", "high"]
_AGAINST = {"solo": "against solo", "frontier": "at equal L2"}
_CLAIMED = {  # of what a claim is held against
    "the solo dictionary of its seed": _AGAINST["solo"],
    "solo dictionaries of equal L2": _AGAINST["frontier"],
}
_MORE_SEEDS = 10
_UNITS = {"": "", "%": "%", "percentage points": " points"}  # of claims
_METHODS = dict(zip(COMPETITORS, ("OrtSAE", "Matryoshka"), strict=True))


def page(
    announcement: Mapping[str, Any],
    profiles: Mapping[str, Profile],
    runs: Mapping[str, Run],
    paper_profile: Profile,
) -> str:
    """The sections of the page, from runs fresh or kept.

    announcement: `book/claims.yml`. profiles: of the runs that it names. paper_profile: of the
    paper's own model, for what it would cost.
    """
    made = announced.made(profiles, runs)
    silent = announced.answered_for(announcement, made)
    speaking = {
        name: runs[source]
        for name, part in announcement["runs"].items()
        if (source := name if name in made else part["seen_in"]) in runs.keys() - silent
        and (name in made or source not in made)
    }
    models = {name: run for name, run in speaking.items() if run.has_table("effects")}
    worlds = [run for name, run in speaking.items() if profiles[name].synthetic]
    if not models:
        return "No run of this book can be discussed yet: make book makes the default one."
    first = next(iter(models.values()))
    sections = {
        "[What replicates](together/co-occurrence.md)": _replicates(models),
        "[What fidelity explains](together/fidelity.md)": _fidelity(models),
        "What the ground truth says": _ground_truth(first, worlds),
        "[What the judge could see](together/interpretability.md)": _judge(first),
        "How the competitors do": _competitors(first, worlds),
        "[For the paper, and against it](announced.md)": _balance(announcement, speaking, models),
        "What to run next on a GPU": _next(paper_profile, first),
    }
    written = (f"## {title}\n\n{' '.join(said)}" for title, said in sections.items())
    return "\n\n".join([_sizes(speaking), *written])


def _sizes(runs: Mapping[str, Run]) -> str:
    sizes = []
    for run in runs.values():
        training, what = run.profile.training, "samples" if run.profile.synthetic else "tokens"
        facts = run.provenance()
        made = f"{facts['date'][:10]}, commit {facts['commit'][:8]}"
        seeds = f"{len(training.seeds)} seeds"
        sizes.append(f"- {run.name}: {training.train_tokens:,} {what}, {seeds}; {made}")
    return "\n".join(sizes)


def _replicates(models: Mapping[str, Run]) -> Iterator[str]:
    """Against solo: mean |φ|, what it costs, and the strongest penalty."""
    published, heavy = load_published(), grid_id(1.0, 1.0)
    headline, at_1 = (
        percent(published[f"gpt2-large.table1.{setting}.{_PHI[0]}"])
        for setting in (grid_id(0.3, 1.0), heavy)
    )
    yield f"In the paper joint training changes mean |φ| by {headline}, and by {at_1} at λ₂ = 1."
    for run in models.values():
        grid = run.load_table("grid")
        grid = grid[grid.kind == "joint"]
        (chosen,) = grid[grid.selected].to_dict("records")
        said = [
            f"it {_moved(*(chosen[c] for c in _PHI))}, for {percent(chosen['d_l2_pct'])} of L2 and "
            f"{number(chosen['d_ce_points'], 2)} points of CE"
        ]
        for row in grid[grid.setting == f"joint-{heavy}"].to_dict("records"):
            said.append(f"at λ₂ = 1 it {_moved(*(row[c] for c in _PHI))}")
        yield f"In {run.name} {'; '.join(said)}."
    first = next(iter(models.values()))
    judged, _, _ = scorecard_sentence(saved_scorecard(first)).partition(". ")
    yield judged.replace("this run", first.name) + "."
    if first.has_table("split_counts"):
        found = splitting.pool(first.load_table("split_counts"))
        yield (
            f"{found.split_share:.1%} of solo features split in a joint dictionary, "
            f"{found.null_share:.1%} in another solo one."
        )


def _fidelity(models: Mapping[str, Run]) -> Iterator[str]:
    """At equal L2: all of mean |φ|, and what is above the null of the same firing rates."""
    ways = {name: effects_by_way(run) for name, run in models.items()}
    told = {
        "frontier": "Against solo dictionaries that reconstruct as badly (a smaller k, equal L2), "
        "mean |φ|",
        "excess": "What is above the null of the same firing rates",
    }
    for way, what in told.items():
        changes = {name: found[way] for name, found in ways.items() if way in found}
        said = [f"{_moved(*(row[k] for k in _CHANGE))} in {name}" for name, row in changes.items()]
        if said:
            yield f"{what} {enumerated(said)}."
    yield from (f"{n} has {announced.NOTHING}." for n in ways if "frontier" not in ways[n])
    ends = [found["frontier"] for found in ways.values() if "frontier" in found]
    more = sum(row["low"] > 0 for row in ends)
    yield f"For the same L2 a smaller k lowers mean |φ| more in {more} of {len(ends)} runs."
    yield from _trained_for_less(models)
    first = next(iter(models.values()))
    yield elasticity_sentence(first).replace("In this run", f"In {first.name}")


def _trained_for_less(models: Mapping[str, Run]) -> Iterator[str]:
    """At equal L2 by a shorter training, at the same k: nobody announced it, so it says so."""
    for run, shorter in permutations(models.values(), 2):
        if _subject(run) != _subject(shorter) or _tokens(shorter) >= _tokens(run):
            continue
        arms, rivals = (one.load_table("frontier") for one in (run, shorter))
        curve = rivals[rivals.kind == "solo"].assign(kind="frontier")
        arms = pd.concat([arms[arms.kind != "frontier"], curve])
        found = paired_measures(run, arms, ["mean_abs"])
        for row in found[found.against == "equal L2"].to_dict("records"):
            change = (100 * row[end] / row["base"] for end in ("change", "low", "high"))
            yield (
                "Against solo dictionaries of the same k that were trained for less, to equal L2, "
                f"it {_moved(*change)} in {run.name}; this was not announced."
            )


def _subject(run: Run) -> tuple[Any, ...]:
    """Of which model, dictionary and held-out text a run's mean |φ| is."""
    model, hashes = run.profile.model, run.table_record("frontier")["token_hashes"] or {}
    held_out = {role: text for role, text in hashes.items() if role != "train"}
    return model.source, model.layer, run.profile.dictionary, held_out


def _tokens(run: Run) -> int:
    return run.profile.training.train_tokens


def _ground_truth(model: Run, worlds: Sequence[Run]) -> Iterator[str]:
    """Where the true atoms are known: a world of the published size, and a small one."""
    for world in worlds:
        scores, changes = (
            world.load_table(f"synthsaebench{name}") for name in ("", "_differences")
        )
        *said, _ = synthsaebench_sentences(scores, changes)
        yield f"In SynthSAEBench-16k: {' '.join(said)}"
    if model.has_table("ground_truth"):
        rank = recovery_rank(model.load_table("ground_truth"))
        yield (
            "In a world of 128 atoms, mean |φ| and the share recovered have a rank correlation of "
            f"{number(rank, 2)}; −1 is the paper's reading."
        )


def _judge(model: Run) -> Iterator[str]:
    """What the scores say, and how small a difference they can show."""
    judge = model.profile.autointerp.judge
    compared = pd.DataFrame()
    if model.has_table("autointerp_compared"):
        compared = model.load_table("autointerp_compared")
        compared = compared[(compared.judge == judge) & (compared.pairs == "matched")]
        compared = compared[compared.n > 0]
    if compared.empty:
        yield "No score of this run counts: its judge did not pass its controls."
        return
    paper = load_published()["gpt2-large.fuzz_paired_delta"]
    yield f"The paper's fuzzing scores differ by {signed(paper)}."
    parts = []
    for score in ("fuzzing", "detection"):
        said = [
            f"{_moved(row['delta'], row['low'], row['high'], signed)} {_AGAINST[row['against']]}"
            for row in compared[compared.score == score].to_dict("records")
        ]
        parts.append(f"{score} {' and '.join(said)}")
    yield f"By the {judge} judge, {'; '.join(parts)}."
    fuzzing = compared[compared.score == "fuzzing"]
    least = float((fuzzing.high - fuzzing.low).min()) / 2
    yield f"A difference of fuzzing below {number(least, 2)} it could not have seen."


def _competitors(model: Run, worlds: Sequence[Run]) -> Iterator[str]:
    """Other methods against the same complaint, against solo and at equal L2."""
    tables = {
        "solo": model.load_table("grid"),
        "frontier": setting_table(model.load_table("frontier_pairs")),
    }
    for kind, name in _METHODS.items():
        said = [
            f"{_moved(*(row[c] for c in _PHI))} {_AGAINST[against]}"
            for against, rows in tables.items()
            for row in rows[rows.kind == kind].to_dict("records")
        ]
        yield (
            f"Mean |φ| of {name} {' and '.join(said)}."
            if said
            else f"{model.name} trains no {name} arm."
        )
    for world in worlds:
        changes = world.load_table("synthsaebench_differences")
        changes = changes[(changes.against == "equal L2") & (changes.measure == "mcc")]
        said = [
            f"of {_METHODS[row['kind']]} "
            + _moved(row["difference"], row["low"], row["high"], signed)
            for row in changes[changes.kind.isin(COMPETITORS)].to_dict("records")
        ]
        if said:
            yield f"In SynthSAEBench, MCC {enumerated(said)} at equal L2."


def _balance(
    announcement: Mapping[str, Any], speaking: Mapping[str, Run], models: Mapping[str, Run]
) -> Iterator[str]:
    """Every announced claim of the paper on the side on which its interval speaks."""
    ways = [effects_by_way(run) for run in models.values()]
    solo, equal = (
        sum(way in found and found[way]["high"] < 0 for found in ways)
        for way in ("seeds", "frontier")
    )
    yield (
        f"For the paper speaks that by its own comparison mean |φ| falls in {solo} of {len(ways)} "
        "runs, all of models smaller than its own and trained for less; against it, that at equal "
        f"L2 it falls in {equal} of {sum('frontier' in found for found in ways)}."
    )
    answers, sides = Counter[str](), {announced.FOR: "", announced.AGAINST: ""}
    for name, run in speaking.items():
        claimed = [claim for claim in announcement["runs"][name]["claims"]
                   if claim["row"].get("kind") not in COMPETITORS]  # fmt: skip
        claimed.sort(key=itemgetter("against"))
        for against, claims in groupby(claimed, itemgetter("against")):
            found: dict[str, list[str]] = {answer: [] for answer in announced.ANSWERS}
            for claim in claims:
                change, low, high, _ = announced.found(run, claim) or announced.LACKING
                what, _, unit = claim["what"].partition(", ")
                size = f"{'+' * (change > 0)}{number(change, 2)}{_UNITS[unit]}"
                found[announced.judged(claim["says"], low, high)].append(f"{what} {size}")
            answers.update({answer: len(said) for answer, said in found.items()})
            for answer in sides:
                if said := "; ".join(found[answer]):
                    sides[answer] += f"\n- {run.name}, {_CLAIMED[against]}: {said}"
    counts = (f"{n} {answer}" for answer, n in answers.items() if n)
    yield f"Of its {answers.total()} announced claims: {enumerated(counts)}."
    for answer, said in sides.items():
        yield f"\n\n**{answer.capitalize()}:**\n{said or 'none'}"


def _next(paper_profile: Profile, model: Run) -> Iterator[str]:
    """What this run is too small for, and what it would cost."""
    yield scale_of_run(model).replace("This", model.name, 1)
    yield (
        f"So the paper's own shapes first: all {len(paper_profile.arms())} arms of "
        f"{paper_profile.name} take {number(hours(paper_profile, 'h100'), 2)} hours of an H100, by "
        "assumed rates."
    )
    if at_equal := effects_by_way(model).get("frontier"):
        low, high, n_seeds = (at_equal[key] for key in ("low", "high", "n_seeds"))
        yield (
            f"Then seeds: {_MORE_SEEDS} would bring the interval at equal L2 from "
            f"± {number((high - low) / 2, 2)}% to "
            f"± {number(expected_reach(low, high, int(n_seeds), _MORE_SEEDS), 2)}%."
        )
    yield "Then the paper's own judge, Qwen2.5-72B, over HTTP."


def _moved(change: float, low: float, high: float, show: Callable[[float], str] = percent) -> str:
    """Which way something goes, with its size and interval; nan: beyond the solo curve."""
    if math.isnan(change):
        return f"has {announced.NOTHING}"
    return f"{moves(low, high)} ({with_ends(change, low, high, show)})"
