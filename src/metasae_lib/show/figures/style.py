"""The look that all figures share.

Figures are made without pyplot, so none stays open. All share one style: Okabe and Ito's colours
(told apart by every kind of colour vision), a shape beside every colour, white ground, text of at
least 9 points.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "matched-fidelity": ("#7A5195", "d"),
    "as-released": ("#8C6D31", "*"),
    "paper": (RED, "D"),
    "null": (PINK, "v"),
}
_OTHERS = [(GREY, "h"), ("#A0522D", "p")]
ROW = 0.24  # inches that a labelled row needs
SERIES = [(BLUE, "o"), (GREEN, "s"), (PINK, "^"), (ORANGE, "D"), (SKY, "v"), (RED, "P")]


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure of the book."""
    with sns.axes_style("ticks"), sns.plotting_context("notebook"), mpl.rc_context():
        mpl.rcParams.update(
            {
                "font.size": 10, "axes.labelsize": 10.5, "axes.titlesize": 10.5,
                "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "legend.fontsize": 9.5,
                "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.axisbelow": True,
                "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 6,
                "figure.facecolor": "white", "axes.facecolor": "white", "figure.dpi": 144,
                "mathtext.default": "regular", "axes.unicode_minus": True,
            }
        )  # fmt: skip
        yield


class Drawing(Figure):
    """A figure that a notebook shows without pyplot or a magic command."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


P = ParamSpec("P")


def styled(
    width: float = 7.0, height: float = 3.8
) -> Callable[[Callable[Concatenate[Figure, P], None]], Callable[P, Figure]]:
    """Turn `draw(figure, ...) -> None` into `function(...) -> Figure` in the common style."""

    def decorate(draw: Callable[Concatenate[Figure, P], None]) -> Callable[P, Figure]:
        @functools.wraps(draw)
        def function(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with style():
                figure = Drawing(figsize=(width, height), layout="constrained")
                draw(figure, *args, **kwargs)
                return figure

        return function

    return decorate


def look_of(kind: str) -> tuple[str, str]:
    """Colour and marker of a kind of arm, known or not."""
    if kind in KINDS:
        return KINDS[kind]
    return _OTHERS[sum(map(ord, kind)) % len(_OTHERS)]


def kinds_in(frame: pd.DataFrame) -> list[str]:
    """Kinds of arm in a frame: solo, joint, control first, then the rest as they come."""
    found = list(dict.fromkeys(frame["kind"]))
    return sorted(found, key=lambda k: list(KINDS).index(k) if k in KINDS else len(KINDS))


def add_legend(ax: Axes, **options: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), **options)


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """A legend that no number of arms lets cover the data."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns)


def zero_line(ax: Axes, axis: str = "y") -> None:
    draw = ax.axhline if axis == "y" else ax.axvline
    draw(0, color=BLACK, linewidth=0.8)


@styled(7.0, 3.6)
def escape(figure: Figure, frame: pd.DataFrame) -> None:
    """Angle of a row to its fixed reconstruction while it follows the push.

    Columns: step, angle (degrees), sigma_sq, lambda2; one panel per λ₂.
    """
    panels = frame.groupby("lambda2")
    axes = figure.subplots(1, panels.ngroups, sharey=True, squeeze=False)[0]
    for ax, (lambda2, panel) in zip(axes, panels, strict=True):
        for (sigma_sq, part), (colour, _) in zip(panel.groupby("sigma_sq"), SERIES, strict=False):
            ax.plot(part.step, part.angle, color=colour, label=f"σ² = {sigma_sq:g}")
        ax.set(xlabel="gradient step", title=f"λ₂ = {lambda2:g}")
    axes[0].set_ylabel("angle between row and Ŵ (degrees)")
    axes[0].legend()
