"""Each figure of the book as one function of a result table: data frame in, matplotlib Figure out.

Figures are made without pyplot, so none stays open. All share one style: Okabe and Ito's colours
(told apart by every kind of colour vision), a shape beside every colour, white ground, text of at
least 9 points.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

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
_ROW = 0.24  # inches that a labelled row needs
_SERIES = [(BLUE, "o"), (GREEN, "s"), (PINK, "^"), (ORANGE, "D"), (SKY, "v"), (RED, "P")]

#: The paper's headline in percent; drawn for scale where something else moves mean |φ|.
HEADLINE = -7.5


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


def _styled(
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


def _look(kind: str) -> tuple[str, str]:
    """Colour and marker of a kind of arm, known or not."""
    if kind in KINDS:
        return KINDS[kind]
    return _OTHERS[sum(map(ord, kind)) % len(_OTHERS)]


def _kinds(frame: pd.DataFrame) -> list[str]:
    """Kinds of arm in a frame: solo, joint, control first, then the rest as they come."""
    found = list(dict.fromkeys(frame["kind"]))
    return sorted(found, key=lambda k: list(KINDS).index(k) if k in KINDS else len(KINDS))


def _legend(ax: Axes, **options: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), **options)


def _legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """A legend that no number of arms lets cover the data."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns)


def _zero(ax: Axes, axis: str = "y") -> None:
    draw = ax.axhline if axis == "y" else ax.axvline
    draw(0, color=BLACK, linewidth=0.8)


# --- 01_penalty ------------------------------------------------------------------------------


@_styled(8.0, 3.4)
def penalty_profile(figure: Figure, frame: pd.DataFrame) -> None:
    """Eq. 2 and its slope along the distance r of a row to its reconstruction.

    Columns: r, sigma_sq, penalty, push (the length of the gradient). The peak of each push stands
    at r = σ/√2.
    """
    left, right = figure.subplots(1, 2)
    for (sigma_sq, part), (colour, _) in zip(frame.groupby("sigma_sq"), _SERIES, strict=False):
        label = f"σ² = {sigma_sq:g}"
        left.plot(part.r, part.penalty, color=colour, label=label)
        right.plot(part.r, part.push, color=colour, label=label)
        peak = part[part.push == part.push.max()]
        right.plot(peak.r, peak.push, "o", color=colour)
    left.set(xlabel="distance r between row and reconstruction", ylabel="penalty p(r)")
    right.set(xlabel="distance r between row and reconstruction", ylabel="push |dp/dr|")
    left.legend()
    for ax in (left, right):
        ax.set_xlim(0, frame.r.max())
        ax.set_ylim(0)


@_styled(5.6, 5.0)
def push_2d(figure: Figure, field: pd.DataFrame, rows: pd.DataFrame) -> None:
    """The push in the plane, and what is left of it on unit rows.

    `field`: x, y, u, v, penalty on a square grid (u, v = minus the gradient). `rows`: x, y, u, v
    on the unit circle (u, v = its tangential part). Reconstruction at (`what_x`, `what_y`) of
    `field`.
    """
    ax = figure.subplots()
    side = round(len(field) ** 0.5)
    grid = {name: field[name].to_numpy().reshape(side, side) for name in ("x", "y", "penalty")}
    shade = ax.contourf(grid["x"], grid["y"], grid["penalty"], levels=12, cmap="Blues", alpha=0.75)
    figure.colorbar(shade, ax=ax, label="penalty p", shrink=0.8)
    step = max(side // 14, 1)
    thin = field[(field.index % side % step == 0) & (field.index // side % step == 0)]
    ax.quiver(
        thin.x, thin.y, thin.u, thin.v, color=GREY, width=0.003, scale=22, label="push in the plane"
    )
    ax.quiver(
        rows.x, rows.y, rows.u, rows.v, color=RED, width=0.006, scale=12, zorder=3,
        label="push on unit rows",
    )  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color=BLACK, linewidth=1)
    ax.plot(
        field.what_x[0], field.what_y[0], "*", color=ORANGE, markersize=15, label="Ŵ", mec=BLACK
    )
    ax.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


@_styled(5.6, 5.2)
def push_3d(figure: Figure, rows: pd.DataFrame) -> None:
    """Unit rows in space, pushed out of the plane that the meta dictionary spans.

    Columns: x, y, z, u, v, w (the tangential push), penalty.
    """
    ax = cast(Axes3D, figure.add_subplot(projection="3d"))
    turn = np.linspace(0, 2 * np.pi, 100)
    rim = np.stack([np.cos(turn), np.sin(turn), np.zeros(100)], axis=1)
    ax.add_collection3d(Poly3DCollection([rim], facecolor=ORANGE, edgecolor=ORANGE, alpha=0.35))
    dots = ax.scatter(
        rows.x, rows.y, rows.z, c=rows.penalty, cmap="Blues", vmin=0, vmax=1, edgecolor=BLACK,
        linewidth=0.4, s=28, depthshade=False,
    )  # fmt: skip
    ax.quiver(rows.x, rows.y, rows.z, rows.u, rows.v, rows.w, color=RED, linewidth=1)
    figure.colorbar(dots, ax=ax, label="penalty p", shrink=0.6, pad=0.1)
    ax.set(xlabel="in the plane", ylabel="in the plane", zlabel="out of the plane")
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_ticks([-1, 0, 1])
    ax.view_init(elev=18, azim=-60)
    ax.set_box_aspect((1, 1, 1), zoom=0.9)


@_styled(7.0, 3.6)
def escape(figure: Figure, frame: pd.DataFrame) -> None:
    """Angle of a row to its fixed reconstruction while it follows the push.

    Columns: step, angle (degrees), sigma_sq, lambda2; one panel per λ₂.
    """
    panels = frame.groupby("lambda2")
    axes = figure.subplots(1, panels.ngroups, sharey=True, squeeze=False)[0]
    for ax, (lambda2, panel) in zip(axes, panels, strict=True):
        for (sigma_sq, part), (colour, _) in zip(panel.groupby("sigma_sq"), _SERIES, strict=False):
            ax.plot(part.step, part.angle, color=colour, label=f"σ² = {sigma_sq:g}")
        ax.set(xlabel="gradient step", title=f"λ₂ = {lambda2:g}")
    axes[0].set_ylabel("angle between row and Ŵ (degrees)")
    axes[0].legend()


# --- 02_training -----------------------------------------------------------------------------


@_styled(7.0, 3.6)
def training_curve(
    figure: Figure, frame: pd.DataFrame, column: str, label: str, log: bool = False
) -> None:
    """One quantity of every arm along the training tokens.

    Columns: arm, kind, tokens, and the named one. Arms of a kind share a colour.
    """
    ax = figure.subplots()
    for kind in _kinds(frame):
        colour, _ = _look(kind)
        # The control lies exactly on its solo arm: dashes let both be seen.
        dashes = (0, (4, 3)) if kind == "control" else "-"
        for _, part in frame[frame.kind == kind].groupby("arm"):
            ax.plot(
                part.tokens / 1e6, part[column], color=colour, linestyle=dashes, label=kind,
                linewidth=1.3, zorder=3 if kind == "control" else 2,
            )  # fmt: skip
    ax.set(xlabel="training tokens (millions)", ylabel=label)
    if log:
        ax.set_yscale("log")
        # Plain numbers: a loss rarely spans more than one power of ten.
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(ScalarFormatter())
    _legend_below(figure, ax, 4)


@_styled(8.0, 3.6)
def fidelity(figure: Figure, frame: pd.DataFrame) -> None:
    """What each arm loses: L2 on held-out tokens and the CE overhead. Columns: arm, kind, l2,
    ce_overhead_pct."""
    figure.set_figheight(max(3.6, 1.4 + _ROW * len(frame)))
    axes = figure.subplots(1, 2, sharey=True)
    places = {arm: -i for i, arm in enumerate(frame.arm)}
    for ax, column in zip(axes, ("l2", "ce_overhead_pct"), strict=True):
        for kind in _kinds(frame):
            part, (colour, marker) = frame[frame.kind == kind], _look(kind)
            ax.plot(part[column], part.arm.map(places), marker, color=colour, label=kind)
    axes[0].set(xlabel="L2 (share of unit variance)", yticks=list(places.values()))
    axes[0].set_yticklabels(list(places))
    axes[1].set_xlabel("CE overhead (% of the model's CE)")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


@_styled(7.0, 3.8)
def ablation(figure: Figure, frame: pd.DataFrame) -> None:
    """BatchTopK against JumpReLU: held-out L2 over L0, solo and joint.

    Columns: architecture, penalty (solo or joint), l0, l2. Lines join what differs in k alone.
    """
    ax = figure.subplots()
    for (architecture, penalty), part in frame.sort_values("l0").groupby(
        ["architecture", "penalty"], sort=False
    ):
        colour, marker = (BLUE, "s") if architecture == "BatchTopK" else (ORANGE, "^")
        ax.plot(
            part.l0, part.l2, marker, color=colour, label=f"{architecture}, {penalty}",
            linestyle="-" if penalty == "solo" else (0, (4, 3)), linewidth=1.2, markersize=7,
            fillstyle="full" if penalty == "solo" else "none",
        )  # fmt: skip
    ax.set(xlabel="L0 at the thresholds (features a token)", ylabel="L2 (share of unit variance)")
    _legend(ax)


@_styled(7.0, 3.0)
def time_spent(figure: Figure, frame: pd.DataFrame) -> None:
    """Seconds that each stage of the run took. Columns: stage, seconds."""
    ax = figure.subplots()
    frame = frame.sort_values("seconds")
    bars = ax.barh(frame.stage, frame.seconds, color=SKY)
    ax.bar_label(bars, labels=[f" {s:,.0f} s" for s in frame.seconds])
    ax.set_xlabel("time (s)")
    ax.margins(x=0.12)
    ax.grid(False)


# --- 03_cooccurrence -------------------------------------------------------------------------


@_styled(7.0, 3.8)
def threshold_calibration(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix A: how often BatchTopK selects a feature, against how often it fires above its
    threshold on other text. Columns: kind, selected_rate, scan_rate (per token)."""
    ax = figure.subplots()
    seen = frame[(frame.selected_rate > 0) & (frame.scan_rate > 0)]
    for kind in _kinds(seen):
        part, (colour, marker) = seen[seen.kind == kind], _look(kind)
        ax.plot(
            part.selected_rate, part.scan_rate, marker, color=colour, alpha=0.35, markersize=3,
            markeredgewidth=0, label=kind,
        )  # fmt: skip
    ends = [seen.selected_rate.min(), seen.selected_rate.max()]
    ax.plot(ends, ends, color=GREY, linewidth=1, label="equal")
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="rate selected on calibration text", ylabel="rate above θ on scan text")
    legend = ax.legend()
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


@_styled(7.0, 3.8)
def density_difference(figure: Figure, frame: pd.DataFrame) -> None:
    """Figure 1a: density of φ in the joint arm minus that in the solo arm.

    Columns: phi (bin centre), width, difference (per unit of φ), and low, high: the same between
    solo seeds, or NaN with one seed.
    """
    ax = figure.subplots()
    ax.fill_between(
        frame.phi, frame.low, frame.high, color=GREY, alpha=0.35, step="mid", linewidth=0,
        label="between two solo seeds",
    )  # fmt: skip
    ax.step(frame.phi, frame.difference, where="mid", color=BLUE, label="joint − solo")
    _zero(ax)
    ax.set(xlabel="φ", ylabel="difference of density (per unit of φ)")
    # Nearly all pairs lie within a few thousandths of zero: a symlog axis shows tails and peak.
    ax.set_xscale("symlog", linthresh=1e-3)
    peak = frame.difference.abs().max()
    if peak > 0:
        ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(peak / 30)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


@_styled(7.2, 4.4)
def trade_off(figure: Figure, ours: pd.DataFrame, paper: pd.DataFrame) -> None:
    """Figure 1b: change of mean |φ| against change of L2; colour is σ², size is λ₂.

    `ours`: kind, lambda2, sigma_sq, d_l2_pct, d_mean_abs_phi_pct, low, high (interval of the
    latter), selected (bool). `paper`: lambda2, sigma_sq, d_l2_pct, d_mean_abs_phi_pct. The line is
    the Pareto front of ours; grey is where other solo seeds fall.
    """
    ax = figure.subplots()
    ax.plot(
        paper.d_l2_pct, paper.d_mean_abs_phi_pct, "D", color=RED, mfc="none", markersize=5,
        label="paper, GPT-2 large",
    )  # fmt: skip
    solo = ours[ours.kind == "solo"]
    ax.plot(
        solo.d_l2_pct, solo.d_mean_abs_phi_pct, "o", color=GREY, markersize=5,
        label="another solo seed",
    )  # fmt: skip
    control = ours[ours.kind == "control"]
    ax.plot(
        control.d_l2_pct, control.d_mean_abs_phi_pct, "^", color=ORANGE, label="control, λ₂ = 0"
    )
    for kind in _kinds(ours[~ours.kind.isin(["solo", "control", "joint"])]):
        part, (colour, marker) = ours[ours.kind == kind], _look(kind)
        ax.plot(part.d_l2_pct, part.d_mean_abs_phi_pct, marker, color=colour, label=kind)
    joint = ours[ours.kind == "joint"]
    sizes = {value: 4 + 3 * place for place, value in enumerate(sorted(joint.lambda2.unique()))}
    for (sigma_sq, part), (colour, marker) in zip(joint.groupby("sigma_sq"), _SERIES, strict=False):
        reach = np.abs(part[["low", "high"]].to_numpy().T - part.d_mean_abs_phi_pct.to_numpy())
        ax.errorbar(
            part.d_l2_pct, part.d_mean_abs_phi_pct, reach, fmt="none", color=colour, capsize=3,
            elinewidth=0.8, alpha=0.5,
        )  # fmt: skip
        for lambda2, same in part.groupby("lambda2"):
            ax.plot(
                same.d_l2_pct, same.d_mean_abs_phi_pct, marker, color=colour,
                markersize=sizes[lambda2],
            )  # fmt: skip
        ax.plot([], [], marker, color=colour, label=f"joint, σ² = {sigma_sq:g}")
    for lambda2, size in sizes.items():
        ax.plot([], [], "o", color=GREY, mfc="none", markersize=size, label=f"λ₂ = {lambda2:g}")
    front = pareto_front(joint)
    if len(front) > 1:
        ax.plot(front.d_l2_pct, front.d_mean_abs_phi_pct, color=BLACK, linewidth=1, zorder=1)
    best = joint[joint.selected]
    ax.plot(
        best.d_l2_pct, best.d_mean_abs_phi_pct, "o", mfc="none", mec=BLACK, markersize=14,
        label="selected setting",
    )  # fmt: skip
    _zero(ax)
    _zero(ax, "x")
    ax.set(xlabel="change of L2 (%)", ylabel="change of mean |φ| (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats in both changes, in the order of d_l2_pct."""
    ordered = frame.sort_values(["d_l2_pct", "d_mean_abs_phi_pct"])
    best = ordered.d_mean_abs_phi_pct.astype(float).cummin()
    return ordered[best < best.shift(fill_value=np.inf)]


@_styled(7.2, 4.0)
def against_chance(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of each arm beside what independent features would give.

    Columns: arm, kind, mean_abs, low, high, null_mean_abs (independent features of the same rates),
    noise_floor (√(2/(πn)), from the number of tokens alone).
    """
    figure.set_figheight(max(4.0, 1.6 + _ROW * len(frame)))
    ax = figure.subplots()
    for i, (_, row) in enumerate(frame.iterrows()):
        colour, marker = _look(row.kind)
        reach = [[row.mean_abs - row.low], [row.high - row.mean_abs]]
        ax.errorbar(row.mean_abs * 1e3, -i, xerr=np.array(reach) * 1e3, fmt=marker, color=colour,
                    capsize=3)  # fmt: skip
        ax.plot(row.null_mean_abs * 1e3, -i, "v", color=PINK, label="same rates, independent")
        ax.plot(
            [row.noise_floor * 1e3] * 2, [-i - 0.35, -i + 0.35], color=GREY, linewidth=2,
            label="noise floor √(2/(πn))",
        )  # fmt: skip
    ax.set_yticks([-i for i in range(len(frame))], list(frame.arm))
    ax.set_xlabel("mean |φ| (thousandths)")
    ax.set_xlim(0)
    _legend_below(figure, ax, 2)


@_styled(7.2, 3.4)
def effect(figure: Figure, frame: pd.DataFrame, published: dict[str, float]) -> None:
    """The change of mean |φ| under each way to compare. Columns: comparison, change_pct, low, high.

    `published`: label → percent, drawn as lines.
    """
    figure.set_figheight(max(3.4, 1.6 + _ROW * len(frame)))
    ax = figure.subplots()
    for i, (_, row) in enumerate(frame.iterrows()):
        reach = [[row.change_pct - row.low], [row.high - row.change_pct]]
        ax.errorbar(row.change_pct, -i, xerr=np.array(reach), fmt="s", color=BLUE, capsize=4)
    for (label, value), dashes in zip(published.items(), ("-", ":"), strict=False):
        ax.axvline(value, color=RED, linestyle=dashes, linewidth=1.4, label=label)
    _zero(ax, "x")
    ax.set_yticks([-i for i in range(len(frame))], list(frame.comparison))
    ax.set_xlabel("change of mean |φ|, joint against solo (%)")
    ax.margins(y=0.2)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)


@_styled(7.0, 3.6)
def firing_rates(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix B: share of alive features that fire less often than a rate.

    Columns: arm, kind, rate (per token).
    """
    ax = figure.subplots()
    alive = frame[frame.rate > 0]
    for kind in _kinds(alive):
        for _, part in alive[alive.kind == kind].groupby("arm"):
            rates = np.sort(part.rate.to_numpy())
            share = np.arange(1, len(rates) + 1) / len(rates)
            dashes = (0, (4, 3)) if kind == "control" else "-"
            ax.step(rates, share, color=_look(kind)[0], linestyle=dashes, label=kind, linewidth=1.3)
    ax.set(xscale="log", xlabel="firing rate (per token)", ylabel="share of features below it")
    _legend(ax)


@_styled(7.0, 3.6)
def phi_distribution(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix C: density of φ over all pairs, a line per arm. Columns: arm, kind, phi, density."""
    ax = figure.subplots()
    for kind in _kinds(frame):
        for _, part in frame[frame.kind == kind].groupby("arm"):
            seen = part[part.density > 0]
            dashes = (0, (4, 3)) if kind == "control" else "-"
            ax.step(seen.phi, seen.density, where="mid", color=_look(kind)[0], linestyle=dashes,
                    label=kind, linewidth=1.3)  # fmt: skip
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set(xlabel="φ", ylabel="density of pairs (per unit of φ)", yscale="log")
    ax.set_xscale("symlog", linthresh=1e-3)
    _legend(ax)


@_styled(7.0, 3.2)
def activation_norms(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix D: quantiles of the residual's norm. Columns: quantile (0..1), norm; `mean` and
    `std` repeated."""
    ax = figure.subplots()
    ax.plot(frame.norm, frame["quantile"], color=BLUE, label="share of tokens below")
    ax.axvline(frame["mean"].iloc[0], color=RED, linestyle="--", label="mean")
    ax.set(xscale="log", xlabel="‖x‖₂ of the residual (model units)", ylabel="share of tokens")
    ax.legend()


@_styled(7.0, 3.8)
def elasticity(figure: Figure, frame: pd.DataFrame) -> None:
    """How much a common shift of the thresholds moves mean |φ|, with the paper's −7.5% for scale.

    Columns: arm, kind, scale (of θ), change_pct (against scale 1).
    """
    ax = figure.subplots()
    for kind in _kinds(frame):
        colour, marker = _look(kind)
        dashes = (0, (4, 3)) if kind == "control" else "-"
        for _, part in frame[frame.kind == kind].groupby("arm"):
            ax.plot(part.scale, part.change_pct, marker=marker, color=colour, linestyle=dashes,
                    label=kind, markersize=4)  # fmt: skip
    ax.axhspan(HEADLINE, 0, color=RED, alpha=0.12, linewidth=0)
    ax.axhline(HEADLINE, color=RED, label="the paper’s −7.5%")
    _zero(ax)
    ax.set(xlabel="every threshold θ times", ylabel="change of mean |φ| (%)")
    _legend_below(figure, ax, 4)


@_styled(7.0, 3.6)
def phi_by_rate(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of pairs by the features' firing rate, beside independent features of that rate.

    Columns: kind, arm, rate (centre of the bin), mean_abs, null_mean_abs.
    """
    ax = figure.subplots()
    for kind in _kinds(frame):
        colour, marker = _look(kind)
        for _, part in frame[frame.kind == kind].groupby("arm"):
            ax.plot(part.rate, part.mean_abs, marker + "-", color=colour, label=kind, markersize=4)
            ax.plot(part.rate, part.null_mean_abs, "--", color=PINK, linewidth=1,
                    label="same rates, independent")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="firing rate (per token)", ylabel="mean |φ|")
    _legend(ax)


# --- 05_case_studies -------------------------------------------------------------------------

_ROLES = {"joint": "solo and joint", "same start": "same start", "null": "solo and solo"}


@_styled(7.0, 3.4)
def split_counts(figure: Figure, frame: pd.DataFrame) -> None:
    """How many features split, and how many merge, in each pair of dictionaries.

    Columns: role (joint, same start, null), a, b, splits, merges. Between two solo dictionaries
    neither direction has a meaning; how many there are is what seeds do.
    """
    figure.set_figheight(max(3.4, 1.0 + 2 * _ROW * len(frame)))
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


@_styled(7.0, 4.2)
def sense_information(figure: Figure, frame: pd.DataFrame) -> None:
    """How much of a word's sense the best single feature tells, by kind of arm.

    Columns: word, kind, share (of what there is to know, above chance), chance (the 95% quantile of
    shuffled senses on the same scale).
    """
    ax = figure.subplots()
    words = list(dict.fromkeys(frame.word))
    for kind in _kinds(frame):
        colour, marker = _look(kind)
        part = frame[frame.kind == kind]
        rows = [words.index(w) for w in part.word]
        ax.plot(part.share, rows, marker, color=colour, label=kind, alpha=0.8)
        ax.plot(part.chance, rows, "|", color=PINK, markersize=14, label="shuffled senses, 95%")
    _zero(ax, "x")
    ax.set_yticks(range(len(words)), words)
    ax.invert_yaxis()
    ax.set_xlabel("sense information of the best feature, 0 chance, 1 all of it")
    _legend(ax, loc="upper center", bbox_to_anchor=(0.45, 1.12), ncols=4)


# --- 06_ground_truth -------------------------------------------------------------------------


@_styled(8.0, 3.6)
def recovery(figure: Figure, frame: pd.DataFrame) -> None:
    """Recovered atoms and blending of a world with known atoms, along λ₂.

    Columns: lambda2 (0: solo), pair (kind of pair), recovered (share of atoms), blending; a row a
    seed. Lines join the means.
    """
    axes = figure.subplots(1, 2)
    settings = sorted(frame.lambda2.unique())
    labels = ["solo" if value == 0 else f"{value:g}" for value in settings]
    for ax, column in zip(axes, ("recovered", "blending"), strict=True):
        for (pair, part), (colour, marker) in zip(frame.groupby("pair"), _SERIES, strict=False):
            at = [settings.index(value) for value in part.lambda2]
            ax.plot(at, part[column], marker, color=colour, alpha=0.35, markersize=5)
            mean = part.groupby("lambda2")[column].mean()
            ax.plot(range(len(settings)), mean, marker + "-", color=colour, label=pair)
        ax.set_xticks(range(len(settings)), labels)
        ax.set_xlabel("λ₂")
    axes[0].set_ylabel("share of atoms recovered")
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_ylabel("blending with the pair's other atom")
    axes[1].axhline(0.5, color=BLACK, linewidth=0.8, linestyle=":")
    axes[1].legend()


@_styled(5.6, 3.6)
def phi_against_recovery(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of a dictionary's features against the share of atoms that it recovers.

    Columns: lambda2, kind, mean_abs_phi, recovered, atoms_mean_abs_phi; a row a dictionary.
    """
    ax = figure.subplots()
    for kind in _kinds(frame):
        colour, marker = _look(kind)
        part = frame[frame.kind == kind]
        ax.plot(part.recovered, part.mean_abs_phi, marker, color=colour, label=kind)
        for row in part.drop_duplicates("lambda2").itertuples():
            label = "" if row.lambda2 == 0 else f"λ₂ {row.lambda2:g}"
            ax.annotate(label, (row.recovered, row.mean_abs_phi), (5, 4), fontsize=9,
                        textcoords="offset points")  # fmt: skip
    ax.axhline(frame.atoms_mean_abs_phi.mean(), color=PINK, linestyle="--", label="the true atoms")
    ax.set(xlabel="share of atoms recovered", ylabel="mean |φ| of the features")
    _legend(ax)


# --- 07_scorecard ----------------------------------------------------------------------------

_VERDICTS = {
    "agrees": BLUE, "as in the paper": BLUE, "made": BLUE,
    "same direction, different size": SKY, "set otherwise": SKY,
    "inconclusive": YELLOW, "disagrees": RED,
    "other model: not comparable": "#BDBDBD", "not run": "#E4E4E4", "not printed": "#F4F4F4",
}  # fmt: skip


@_styled(8.0, 3.8)
def scorecard_overview(figure: Figure, frame: pd.DataFrame) -> None:
    """How many of the published values stand how. Columns: section, group (the verdict)."""
    ax = figure.subplots()
    sections = list(dict.fromkeys(frame.section))
    groups = [g for g in _VERDICTS if (frame.group == g).any()]
    counts = pd.crosstab(frame.section, frame.group).reindex(index=sections, columns=groups)
    left = np.zeros(len(sections))
    for group in groups:
        width = counts[group].to_numpy()
        bars = ax.barh(sections, width, left=left, color=_VERDICTS[group], edgecolor=GREY,
                       linewidth=0.5, label=group)  # fmt: skip
        labels = [str(w) if w else "" for w in width]
        dark = _VERDICTS[group] in (BLUE, RED)
        ax.bar_label(bars, labels, label_type="center", color="white" if dark else BLACK)
        left += width
    ax.invert_yaxis()
    ax.set_xlim(0, 1.03 * left.max())
    ax.set_xlabel("published values")
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3)


# --- 04_autointerp ---------------------------------------------------------------------------


@_styled(8.4, 6.0)
def judge_controls(figure: Figure, frame: pd.DataFrame) -> None:
    """What a judge makes of right, shuffled and empty explanations, whether it prefers the first
    text, and whether it says the same when asked again: one panel each.

    Columns: group, condition, score (also `order bias` and `asked again`), mean, low, high, chance.
    """
    labels = {"order bias": 'share of answers "A"', "asked again": "correlation, asked again"}
    axes = figure.subplots(2, 3).ravel()
    for ax, (name, part) in zip(axes, frame.groupby("score", sort=False), strict=False):
        rows = list(dict.fromkeys(zip(part.group, part.condition, strict=True)))
        for group, (colour, marker) in zip(("planted", "features"), _SERIES, strict=False):
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


@_styled(7.0, 3.8)
def fuzzing_difference(figure: Figure, frame: pd.DataFrame) -> None:
    """Figure 2: density of fuzzing scores in the joint arm minus that in the solo arm.

    Columns: score (bin centre), difference, low, high (95%), judge; one colour a judge.
    """
    ax = figure.subplots()
    judges = frame.groupby("judge", sort=False)
    for (judge, part), (colour, _) in zip(judges, _SERIES, strict=False):
        ax.step(part.score, part.difference, where="mid", color=colour, label=judge)
        ax.fill_between(
            part.score, part.low, part.high, step="mid", color=colour, alpha=0.2, linewidth=0
        )
    _zero(ax)
    ax.set(xlabel="fuzzing score", ylabel="difference of density, joint − solo")
    ax.legend(title="judge")


@_styled(8.4, 3.4)
def scores_together(figure: Figure, frame: pd.DataFrame) -> None:
    """The three scores against each other, one dot a feature. Columns: kind, fuzzing, spearman,
    detection. Scores take few values, so dots are spread a little."""
    axes = figure.subplots(1, 3)
    generator = np.random.default_rng(0)
    names = ("fuzzing", "spearman", "detection")
    for ax, (x, y) in zip(axes, ((0, 1), (0, 2), (1, 2)), strict=True):
        for kind in _kinds(frame):
            part, (colour, marker) = frame[frame.kind == kind], _look(kind)
            spread = generator.uniform(-0.02, 0.02, size=(2, len(part)))
            ax.plot(
                part[names[x]] + spread[0], part[names[y]] + spread[1], marker, color=colour,
                label=kind, markersize=3, alpha=0.35,
            )  # fmt: skip
        ax.set(xlabel=names[x], ylabel=names[y])
    _legend_below(figure, axes[0], 2)
