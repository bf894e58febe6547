"""Figures of judges, splitting and senses."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from metasae_lib.show.figures.style import (
    BLUE,
    ORANGE,
    PINK,
    RED,
    ROW,
    SERIES,
    add_legend,
    kinds_in,
    legend_below,
    look_of,
    styled,
    zero_line,
)

_ROLES = {"joint": "solo and joint", "same start": "same start", "null": "solo and solo"}


@styled(7.0, 3.4)
def split_counts(figure: Figure, frame: pd.DataFrame) -> None:
    """How many features split, and how many merge, in each pair of dictionaries.

    Columns: role (joint, same start, null), a, b, splits, merges. Between two solo dictionaries
    neither direction has a meaning; how many there are is what seeds do.
    """
    figure.set_figheight(max(3.4, 1.0 + 2 * ROW * len(frame)))
    ax = figure.subplots()
    order = [role for role in _ROLES if (frame.role == role).any()]
    frame = frame.sort_values("role", key=lambda r: r.map(order.index), kind="stable")
    place = np.arange(len(frame))
    for shift, column, colour, hatch in ((-0.2, "splits", BLUE, ""), (0.2, "merges", ORANGE, "//")):
        bars = ax.barh(place + shift, frame[column], 0.38, color=colour, hatch=hatch,
                       edgecolor="white", label=column)  # fmt: skip
        ax.bar_label(bars, padding=3)
    names = zip(frame.role, frame.a, frame.b, strict=True)
    ax.set_yticks(place, [f"{_ROLES[role]}: {a[-5:]}, {b[-5:]}" for role, a, b in names])
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set_xlabel("features that come apart in several of the other dictionary")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2)


@styled(7.0, 4.2)
def sense_information(figure: Figure, frame: pd.DataFrame) -> None:
    """How much of a word's sense the best single feature tells, by kind of arm.

    Columns: word, kind, share (of what there is to know, above chance), chance (the 95% quantile of
    shuffled senses on the same scale).
    """
    ax = figure.subplots()
    words = list(dict.fromkeys(frame.word))
    for kind in kinds_in(frame):
        colour, marker = look_of(kind)
        part = frame[frame.kind == kind]
        rows = [words.index(w) for w in part.word]
        ax.plot(part.share, rows, marker, color=colour, label=kind, alpha=0.8)
        ax.plot(part.chance, rows, "|", color=PINK, markersize=14, label="shuffled senses, 95%")
    zero_line(ax, "x")
    ax.set_yticks(range(len(words)), words)
    ax.invert_yaxis()
    ax.set_xlabel("sense information of the best feature, 0 chance, 1 all of it")
    add_legend(ax, loc="upper center", bbox_to_anchor=(0.45, 1.12), ncols=4)


@styled(8.4, 6.0)
def judge_controls(figure: Figure, frame: pd.DataFrame) -> None:
    """What a judge makes of right, shuffled and empty explanations, whether it prefers the first
    text, and whether it says the same when asked again: one panel each.

    Columns: group, condition, score (also `order bias` and `asked again`), mean, low, high, chance.
    """
    labels = {"order bias": 'share of answers "A"', "asked again": "correlation, asked again"}
    axes = figure.subplots(2, 3).ravel()
    for ax, (name, part) in zip(axes, frame.groupby("score", sort=False), strict=False):
        rows = list(dict.fromkeys(zip(part.group, part.condition, strict=True)))
        for group, (colour, marker) in zip(("planted", "features"), SERIES, strict=False):
            for row in part[part.group == group].to_dict("records"):
                y = -rows.index((group, row["condition"]))
                ax.plot([row["low"], row["high"]], [y, y], color=colour)
                ax.plot(row["mean"], y, marker, color=colour, label=group)
        ax.axvline(part.chance.iloc[0], color=RED, linestyle="--", linewidth=1.2, label="chance")
        ax.set_xlabel(labels.get(str(name), f"{name} score"))
        ax.set_yticks([-i for i in range(len(rows))], [f"{g}: {c}" for g, c in rows])
        ax.margins(y=0.15)
    for ax in axes[frame.score.nunique() :]:
        ax.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)


@styled(7.0, 3.8)
def fuzzing_difference(figure: Figure, frame: pd.DataFrame) -> None:
    """Figure 2: density of fuzzing scores in the joint arm minus that in the solo arm.

    Columns: score (bin centre), difference, low, high (95%), judge; one colour a judge.
    """
    ax = figure.subplots()
    judges = frame.groupby("judge", sort=False)
    for (judge, part), (colour, _) in zip(judges, SERIES, strict=False):
        ax.step(part.score, part.difference, where="mid", color=colour, label=judge)
        ax.fill_between(
            part.score, part.low, part.high, step="mid", color=colour, alpha=0.2, linewidth=0
        )
    zero_line(ax)
    ax.set(xlabel="fuzzing score", ylabel="difference of density, joint − solo")
    ax.legend(title="judge")


@styled(8.4, 3.4)
def scores_together(figure: Figure, frame: pd.DataFrame) -> None:
    """The three scores against each other, one dot a feature. Columns: kind, fuzzing, spearman,
    detection. Scores take few values, so dots are spread a little."""
    axes = figure.subplots(1, 3)
    generator = np.random.default_rng(0)
    names = ("fuzzing", "spearman", "detection")
    for ax, (x, y) in zip(axes, ((0, 1), (0, 2), (1, 2)), strict=True):
        for kind in kinds_in(frame):
            part, (colour, marker) = frame[frame.kind == kind], look_of(kind)
            spread = generator.uniform(-0.02, 0.02, size=(2, len(part)))
            ax.plot(
                part[names[x]] + spread[0], part[names[y]] + spread[1], marker, color=colour,
                label=kind, markersize=3, alpha=0.35,
            )  # fmt: skip
        ax.set(xlabel=names[x], ylabel=names[y])
    legend_below(figure, axes[0], 2)
