"""The look that all figures share, and what several of them draw alike."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from numpy.typing import NDArray

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
GREY = "#6B6B6B"
#: Colour and marker of each kind of arm, and of the paper.
KINDS = {
    "solo": (BLACK, "o"),
    "joint": (BLUE, "s"),
    "control": (ORANGE, "^"),
    "jumprelu": (GREEN, "P"),
    "ortsae": (SKY, "X"),
    "matryoshka": ("#882255", ">"),
    "frontier": ("#7A5195", "d"),
    "as-released": ("#8C6D31", "*"),
    "batchtopk": ("#4D4D4D", "<"),
    "critic": ("#A0522D", "8"),
    "random": ("#A6761D", "p"),
    "dense": (GREY, "h"),
    "paper": (RED, "D"),
    "null": (PINK, "v"),
}
_OTHERS = [("#5C6B00", "H"), ("#3D5A80", "H")]
_SERIES = [(BLUE, "o"), (GREEN, "s"), (PINK, "^"), (ORANGE, "D"), (SKY, "v"), (RED, "P")]
DASHES = (0, (4, 3))
ROW = 0.24  # inches that a labelled row needs


# Over seaborn's "ticks" and "notebook".
_STYLE: Any = {
    "font.size": 10, "axes.labelsize": 10.5, "axes.titlesize": 10.5,
    "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "legend.fontsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 6,
    "figure.facecolor": "white", "axes.facecolor": "white", "figure.dpi": 144,
    "mathtext.default": "regular", "axes.unicode_minus": True,
}  # fmt: skip


class Drawing(Figure):
    """A figure that a notebook shows without pyplot or a magic command.

    With the picture goes what a page may offer to the hand: the points of `point`, each with its
    place as shares of the width and of the height, from the upper left.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.points: list[tuple[Axes, float, float, str, str]] = []

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")  # lays the axes out
        points = []
        for ax, x, y, arm, words in self.points:
            place = self.transFigure.inverted().transform(ax.transData.transform((x, y)))
            left, top = round(float(place[0]), 4), round(1 - float(place[1]), 4)
            points.append({"left": left, "top": top, "arm": arm, "words": words})
        return buffer.getvalue(), {"points": points} if points else {}


def point(ax: Axes, x: float, y: float, arm: str, words: str) -> None:
    """Let a reader of the page point at (x, y) in data coordinates.

    arm: of the point, by which it is found in other figures, tables and the explorer, or its name
    without the seed for all of them; empty for none. words: what it shows.
    """
    cast(Drawing, ax.figure).points.append((ax, x, y, arm, words))


P = ParamSpec("P")
_Parts = Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]


def styled(
    width: float = 7.0, height: float = 3.8, **panels: Any
) -> Callable[[Callable[Concatenate[Any, P], None]], Callable[P, Figure]]:
    """Turn `draw(ax, ...) -> None` into `function(...) -> Figure` in the common style.

    panels: options of `Figure.subplots`; with several panels, `draw` is given their array.
    """

    def decorate(draw: Callable[Concatenate[Any, P], None]) -> Callable[P, Figure]:
        @functools.wraps(draw)
        def function(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with mpl.rc_context():
                mpl.rcdefaults()  # not the reader's own matplotlibrc
                mpl.rcParams.update(sns.axes_style("ticks") | sns.plotting_context("notebook"))
                mpl.rcParams.update(_STYLE)
                figure = Drawing(figsize=(width, height), layout="constrained")
                draw(figure.subplots(**panels), *args, **kwargs)
                return figure

        return function

    return decorate


def by_kind(frame: pd.DataFrame, **options: Any) -> _Parts:
    """Kinds of arm in a frame, solo, joint, control first, then the rest as they come.

    Yields the kind, its rows, and options of `plot`: how its points look, changed by `options`.
    """
    order = {kind: place for place, kind in enumerate(KINDS)}
    for kind in sorted(dict.fromkeys(frame["kind"]), key=lambda k: order.get(k, len(KINDS))):
        colour, marker = KINDS.get(kind, _OTHERS[sum(map(ord, kind)) % len(_OTHERS)])
        look = {"color": colour, "marker": marker, "linestyle": "none", "label": kind}
        yield kind, frame[frame.kind == kind], look | options


def by_arm(frame: pd.DataFrame, **options: Any) -> _Parts:
    """The same for each arm: its kind, its rows, and how its line looks."""
    for kind, same, look in by_kind(frame):
        # The control lies exactly on its solo arm: dashes let both be seen.
        line = {"linestyle": DASHES if kind == "control" else "-"}
        for _, part in same.groupby("arm"):
            yield kind, part, look | line | options


def series(
    frame: pd.DataFrame, column: str, sort: bool = True
) -> Iterator[tuple[Any, pd.DataFrame, str, str]]:
    """The groups of a column: value, rows, colour and marker."""
    groups = zip(frame.groupby(column, sort=sort), _SERIES, strict=False)
    return ((value, part, *look) for (value, part), look in groups)


def reach(
    frame: pd.DataFrame, column: str, ends: Sequence[str] = ("low", "high")
) -> NDArray[np.float64]:
    """(2, n) distances of a column to the ends of its interval, for `errorbar`."""
    return np.abs(frame[list(ends)].to_numpy().T - frame[column].to_numpy())


def label_rows(
    ax: Axes, names: Sequence[str], height: float, around: float, row: float = ROW
) -> NDArray[np.int64]:
    """A row a name, downwards, in a figure that has room for them. Returns where they stand.

    In inches: height of the figure at least, what it needs around the rows, and for each row.
    """
    cast(Figure, ax.figure).set_figheight(max(height, around + row * len(names)))
    places = -np.arange(len(names))
    ax.set_yticks(places, names)
    return places


def add_legend(ax: Axes, where: Axes | FigureBase | None = None, **options: Any) -> None:
    """A legend of what `ax` shows, each label once."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    (where or ax).legend(unique.values(), unique.keys(), **options)


def legend_below(ax: Axes, columns: int) -> None:
    """A legend below all panels: no number of arms lets it cover the data."""
    add_legend(ax, ax.figure, loc="outside lower center", ncols=columns)


def zero_line(ax: Axes, axis: str = "y") -> None:
    draw = ax.axhline if axis == "y" else ax.axvline
    draw(0, color=BLACK, linewidth=0.8)
