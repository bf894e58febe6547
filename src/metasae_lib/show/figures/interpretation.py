"""Figures of judges, splitting, senses and verdicts."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from metasae_lib.show.figures import style

# Colours of verdicts, from good to bad.
_VERDICTS = {
    "agrees": style.BLUE, "as in the paper": style.BLUE, "made": style.BLUE,
    "same direction, different size": style.SKY, "set otherwise": style.SKY,
    "inconclusive": style.YELLOW, "disagrees": style.RED,
    "other model: not comparable": "#BDBDBD", "not run": "#E4E4E4", "not printed": "#F4F4F4",
}  # fmt: skip
_ROLES = {"joint": "solo and joint", "same start": "same start", "null": "solo and solo",
          "ortsae": "solo and OrtSAE", "matryoshka": "solo and Matryoshka"}  # fmt: skip


@style.styled(7.0, 3.4)
def split_counts(ax: Axes, frame: pd.DataFrame) -> None:
    """How many features split, and how many merge, in each pair of dictionaries.

    Columns: role (of `splitting.seed_pairs`), a, b, splits, merges. Between two solo dictionaries
    neither direction has a meaning; how many there are is what seeds do.
    """
    order = {role: place for place, role in enumerate(_ROLES)}
    frame = frame.sort_values("role", key=lambda role: role.map(order), kind="stable")
    names = frame.role.map(_ROLES) + ": " + frame.a.str[-5:] + ", " + frame.b.str[-5:]
    y = style.label_rows(ax, list(names), 3.4, 1.0, 2 * style.ROW)
    kinds = ((0.2, "splits", style.BLUE, ""), (-0.2, "merges", style.ORANGE, "//"))
    for shift, column, colour, hatch in kinds:
        bars = ax.barh(y + shift, frame[column], 0.38, color=colour, hatch=hatch,
                       edgecolor="white", label=column)  # fmt: skip
        ax.bar_label(bars, padding=3)
    ax.margins(x=0.1)
    ax.set_xlabel("features that come apart in several of the other dictionary")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2)


@style.styled(7.0, 4.2)
def sense_information(ax: Axes, frame: pd.DataFrame) -> None:
    """How much of a word's sense the best single feature tells, by kind of arm.

    Columns: word, kind, share (of what there is to know, above chance), chance (the 95% quantile of
    shuffled senses on the same scale).
    """
    words = list(dict.fromkeys(frame.word))
    for _, part, look in style.by_kind(frame, alpha=0.8):
        rows = [words.index(w) for w in part.word]
        ax.plot(part.share, rows, **look)
        label = "shuffled senses, 95%"
        ax.plot(part.chance, rows, "|", color=style.PINK, markersize=14, label=label)
    style.zero_line(ax, "x")
    ax.set_yticks(range(len(words)), words)
    ax.invert_yaxis()
    ax.set_xlabel("sense information of the best feature, 0 chance, 1 all of it")
    style.add_legend(ax, loc="upper center", bbox_to_anchor=(0.45, 1.12), ncols=4)


@style.styled(7.0, 4.4)
def cluster(ax: Axes, frame: pd.DataFrame) -> None:
    """φ of the features of a cluster with each other: m columns, and `feature` in words."""
    frame = frame.set_index("feature")
    values = frame.to_numpy()
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.5 else style.BLACK
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(frame)), frame.columns, rotation=90)
    ax.set_yticks(range(len(frame)), frame.index)
    ax.grid(False)
    ax.set_xlabel("feature")
    cast(Figure, ax.figure).colorbar(image, ax=ax, label="φ")


@style.styled(8.4, 5.8, ncols=2, sharey=True)
def probes(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """AUC of sparse probes on every task, a panel a number of features.

    Columns: kind, task (in words), k, auc; `dense` stands in both panels.
    """
    words, dense = list(dict.fromkeys(frame.task)), frame[frame.kind == "dense"]
    for ax, (k, part) in zip(axes, frame[frame.kind != "dense"].groupby("k"), strict=True):
        kinds = style.by_kind(pd.concat([part, dense]), alpha=0.8, markersize=4)
        for lane, (_, same, look) in enumerate(kinds):  # one below the other in each row
            ax.plot(same.auc, [0.3 - 0.15 * lane - words.index(t) for t in same.task], **look)
        ax.axvline(0.5, color=style.RED, linestyle="--", linewidth=1.2, label="chance")
        ax.set_yticks(-np.arange(len(words)), words)
        ax.set_xlabel(f"AUC on the other half of the texts, k = {k}")
    style.legend_below(axes[0], 6)


@style.styled(8.4, 5.6, ncols=3, sharey=True)
def judge_controls(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """What a judge makes of right explanations, of near misses and of wrong ones: a panel a score.

    Columns: group, condition, score, mean, low, high, chance.
    """
    frame = frame[frame.score.isin(["fuzzing", "spearman", "detection"])]
    looks = {"meaning": (style.BLUE, "o"), "form": (style.ORANGE, "D"), "blends": (style.PINK, "^"),
             "features": (style.GREEN, "s")}  # fmt: skip
    rows = list(dict.fromkeys(zip(frame.group, frame.condition, strict=True)))
    for ax, (name, part) in zip(axes, frame.groupby("score", sort=False), strict=False):
        for group, (colour, marker) in looks.items():
            same = part[part.group == group]
            y = [-rows.index((group, condition)) for condition in same.condition]
            ax.plot([same.low, same.high], [y, y], color=colour)
            if len(same):
                ax.plot(same["mean"], y, marker, color=colour, label=group)
        chance = part.chance.iloc[0]
        ax.axvline(chance, color=style.RED, linestyle="--", linewidth=1.2, label="chance")
        ax.set_xlabel(f"{name} score")
        ax.set_yticks([-i for i in range(len(rows))], [f"{g}: {c}" for g, c in rows])
        ax.margins(y=0.05)
    style.legend_below(axes[0], 5)


@style.styled(7.0, 3.8)
def fuzzing_difference(ax: Axes, frame: pd.DataFrame) -> None:
    """Figure 2: density of fuzzing scores in the joint arm minus that in the solo arm.

    Columns: score (bin centre), difference, low, high (95%), judge; one colour a judge.
    """
    for judge, part, colour, _ in style.series(frame, "judge", sort=False):
        ax.step(part.score, part.difference, where="mid", color=colour, label=judge)
        ax.fill_between(
            part.score, part.low, part.high, step="mid", color=colour, alpha=0.2, linewidth=0
        )
    style.zero_line(ax)
    ax.set(xlabel="fuzzing score", ylabel="difference of density, joint − solo")
    ax.legend(title="judge")


@style.styled(8.4, 3.4, ncols=3)
def scores_together(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """The three scores against each other, one dot a feature. Columns: kind, fuzzing, spearman,
    detection. Scores take few values, so dots are spread a little."""
    generator = np.random.default_rng(0)
    pairs = itertools.combinations(("fuzzing", "spearman", "detection"), 2)
    for ax, (x, y) in zip(axes, pairs, strict=True):
        for _, part, look in style.by_kind(frame, markersize=3, alpha=0.35):
            spread = generator.uniform(-0.02, 0.02, size=(2, len(part)))
            ax.plot(part[x] + spread[0], part[y] + spread[1], **look)
        ax.set(xlabel=x, ylabel=y)
    style.legend_below(axes[0], 2)


@style.styled(8.0, 3.8)
def scorecard_overview(ax: Axes, frame: pd.DataFrame) -> None:
    """How many of the published values stand how. Columns: section, group (the verdict)."""
    sections = list(dict.fromkeys(frame.section))
    groups = [g for g in _VERDICTS if (frame.group == g).any()]
    counts = pd.crosstab(frame.section, frame.group).reindex(index=sections, columns=groups)
    left = np.zeros(len(sections))
    for group in groups:
        width = counts[group].to_numpy()
        bars = ax.barh(sections, width, left=left, color=_VERDICTS[group], edgecolor=style.GREY,
                       linewidth=0.5, label=group)  # fmt: skip
        labels = [str(w) if w else "" for w in width]
        dark = _VERDICTS[group] in (style.BLUE, style.RED)
        ax.bar_label(bars, labels, label_type="center", color="white" if dark else style.BLACK)
        left += width
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.03 * left.max()), xlabel="published values")
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3)
