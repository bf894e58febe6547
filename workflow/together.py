"""One page a claim, the profiles of a book side by side.

Everything is read from the tables that finished runs have saved; nothing is computed anew. What a
run does not hold is named in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import landing
from citation import Citation
from metasae_lib import Run
from metasae_lib.show import figures, scorecard, tables
from metasae_lib.show import published as paper
from metasae_lib.show import text as formats
from metasae_lib.study.kept import KeptRun
from metasae_lib.study.machine import commit
from sources import line, saver

FOLDER = "together"


@dataclass(frozen=True)
class Picture:
    """A figure drawn for every profile from its table of that name."""

    table: str
    title: str
    alt: str
    draw: Callable[[pd.DataFrame], Figure]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: the published values that state it, as patterns, and its figures."""

    name: str
    title: str
    text: str
    ids: tuple[str, ...]
    pictures: tuple[Picture, ...]


def _trade_off(frame: pd.DataFrame) -> Figure:
    return figures.trade_off(frame, tables.paper_grid())


CLAIMS = (
    Claim(
        "co-occurrence",
        "Do features co-occur less?",
        "The paper's first claim (§5.1): mean |φ| between features falls under joint training. It"
        " holds on a model if the interval over seeds lies below zero; beside it stand the grid and"
        " what chance alone gives.",
        (
            "gpt2-large.table1.*.d_mean_abs_phi_pct", "*.independent_solo_*", "*.solo_mean_abs_phi",
            "*.lambda0_control", "*.selected", "*.lambda1_failure", "*.welch_t",
        ),
        (
            Picture(
                "effects", "Change of mean |φ| under each way to compare",
                "Points with intervals, one row for each way to compare joint with solo, and lines"
                " at the paper's two values.", figures.effect,
            ),
            Picture(
                "phi", "mean |φ| of every arm against chance",
                "One row an arm: its mean absolute phi with an interval, that of independent"
                " features of the same rates, and the noise floor.", figures.against_chance,
            ),
            Picture(
                "grid", "Change of mean |φ| against change of L2",
                "Scatter of the change of mean absolute phi against that of L2 for every arm, with"
                " the paper's grid behind it.", _trade_off,
            ),
        ),
    ),
    Claim(
        "fidelity",
        "What does it cost in reconstruction?",
        "The price (§5.3): L2 and cross-entropy of the joint dictionaries against the solo ones.",
        (
            "*.table1.*.d_l2_pct", "*ce_overhead_pct*", "*ce_points", "*d_l2_pct_selected",
            "*.dead_*",
        ),
        (
            Picture(
                "arms", "L2 and CE overhead of every arm",
                "Two panels with one row an arm: L2 on held-out tokens, and the overhead of"
                " cross-entropy in percent.", figures.fidelity,
            ),
        ),
    ),
    Claim(
        "interpretability",
        "Are features easier to explain?",
        "The paper's second claim (§5.2): explanations of joint features let a judge tell real from"
        " altered examples more often. A value counts only where the judge passed its controls.",
        ("*.fuzz_*", "*.matched_pairs"),
        (
            Picture(
                "figure_2", "Fuzzing scores, joint minus solo",
                "Steps of the difference of the density of fuzzing scores between joint and solo"
                " features, with a band for each judge.", figures.fuzzing_difference,
            ),
        ),
    ),
    Claim(
        "case-studies",
        "Do blended features split?",
        "The paper's examples (§5.4, App. E): solo features that fire on several senses of a word"
        " come apart in the joint dictionary. Splits count for something only as far as they are"
        " more frequent than merges, and than splits between two solo dictionaries.",
        ("*.case.*.phi",),
        (
            Picture(
                "split_counts", "Splits and merges in pairs of dictionaries",
                "Two horizontal bars for each pair of dictionaries: number of splits and number of"
                " merges.", figures.split_counts,
            ),
            Picture(
                "sense_information", "Sense information of the best single feature",
                "Dots in one row a word: how much of its sense the best feature of each dictionary"
                " tells, and what shuffled senses give.", figures.sense_information,
            ),
        ),
    ),
    Claim(
        "scorecard",
        "Every value, every profile",
        "All values that the paper prints, beside each run of this book. How a verdict is reached"
        " stands on each profile's own scorecard.",
        ("*",),
        (
            Picture(
                "scorecard", "How each run stands to the paper's values",
                "Stacked horizontal bars by section of the paper's values, divided by verdict, with"
                " the number of values in each part.", figures.scorecard_overview,
            ),
        ),
    ),
)  # fmt: skip


def write(
    runs: Mapping[str, Run],
    staging: Path,
    notebooks: Path,
    where: Citation,
    silent: Collection[str] = (),
) -> list[str]:
    """Write the pages, their figures and data into `staging/together`; return the pages' names.

    silent: runs for which an announced one answers. They, and toys, have no column of values.
    """
    folder = staging / FOLDER
    folder.mkdir()
    cards = {
        n: scorecard.saved_scorecard(run) for n, run in runs.items() if run.has_table("scorecard")
    }
    telling = {n: card for n, card in cards.items() if n not in silent and not landing.toy(n)}
    for claim in CLAIMS:
        parts = [f"# {claim.title}", claim.text]
        for picture in claim.pictures:
            parts.append(_tabs(claim, picture, runs, folder, notebooks, where))
        parts += ["## The paper's values and ours", _values(claim, telling or cards, folder, where)]
        (folder / f"{claim.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [f"{FOLDER}/{claim.name}" for claim in CLAIMS]


def _tabs(
    claim: Claim,
    picture: Picture,
    runs: Mapping[str, Run],
    folder: Path,
    notebooks: Path,
    where: Citation,
) -> str:
    lines = [f"## {picture.title}", "", ":::::{tab-set}", ":sync-group: profile", ""]
    for name, run in runs.items():
        lines += [f"::::{{tab-item}} {name}", f":sync: {name}", ""]
        if isinstance(run, KeptRun):
            lines += [f"*{landing.kept_mark(run)}*", ""]
        frame = run.load_table(picture.table) if run.has_table(picture.table) else pd.DataFrame()
        if frame.empty:
            lines += [
                f"This run holds nothing for it: its table `{picture.table}` is missing or empty."
            ]
        else:
            file = f"{claim.name}-{picture.table}-{name}"
            picture.draw(frame).savefig(folder / f"{file}.png")
            frame.to_csv(folder / f"{file}.csv", index=False)
            lines += [
                f"```{{figure}} {file}.png", f":name: fig-{claim.name}-{picture.table}-{name}",
                f":alt: {name}. {picture.alt}", "", f"{picture.title}: {name}.", "```", "",
                line([f"{{download}}`{file}.csv`"], _made(run, picture.table, notebooks, where)),
            ]  # fmt: skip
        lines += ["::::", ""]
    return "\n".join([*lines, ":::::"])


def _made(run: Run, table: str, notebooks: Path, where: Citation) -> str:
    """Which notebook saved a table; of a kept one its lines may have moved since."""
    file, number = saver(table, notebooks) or ("workflow/together.py", None)
    at = None if isinstance(run, KeptRun) else number
    return where.file(file, run.table_record(table)["commit"], at)


def _values(claim: Claim, cards: Mapping[str, pd.DataFrame], folder: Path, where: Citation) -> str:
    """A table with a row a published value, and two columns a profile: ours and the verdict."""
    whole = None
    for name, card in cards.items():
        card = card[[any(fnmatch(i, pattern) for pattern in claim.ids) for i in card.id]]
        rows = scorecard.scorecard_rows(card).drop(columns="difference")
        rows = rows.rename(columns={"ours (interval)": name, "verdict": f"{name}: verdict"})
        whole = rows if whole is None else pd.concat([whole, rows.iloc[:, 3:]], axis=1)
    if whole is None:
        return "No run of this book has a scorecard yet."
    file = f"{claim.name}.csv"
    whole.to_csv(folder / file, index=False)
    short = whole.replace(rf"^{paper.NOT_RUN}: .*", paper.NOT_RUN, regex=True)  # why: in the file
    shown = formats.table(
        short, f"The paper's values beside every run: {claim.title}",
        f"tab-together-{claim.name}", look="filterable",
    )  # fmt: skip
    made = where.file("workflow/together.py", commit())
    why = "Why a value was not run stands in the data."
    return f"{why}\n\n{shown.data}\n{line([f'{{download}}`{file}`'], made)}"
