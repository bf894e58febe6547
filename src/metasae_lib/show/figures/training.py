"""Figures of the penalty, of training and of the synthetic world."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from metasae_lib.show.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PINK,
    RED,
    ROW,
    SERIES,
    SKY,
    add_legend,
    kinds_in,
    legend_below,
    look_of,
    styled,
)


@styled(8.0, 3.4)
def penalty_profile(figure: Figure, frame: pd.DataFrame) -> None:
    """Eq. 2 and its slope along the distance r of a row to its reconstruction.

    Columns: r, sigma_sq, penalty, push (the length of the gradient). The peak of each push stands
    at r = σ/√2.
    """
    left, right = figure.subplots(1, 2)
    for (sigma_sq, part), (colour, _) in zip(frame.groupby("sigma_sq"), SERIES, strict=False):
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


@styled(5.6, 5.0)
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


@styled(5.6, 5.2)
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


@styled(7.0, 3.6)
def training_curve(
    figure: Figure, frame: pd.DataFrame, column: str, label: str, log: bool = False
) -> None:
    """One quantity of every arm along the training tokens.

    Columns: arm, kind, tokens, and the named one. Arms of a kind share a colour.
    """
    ax = figure.subplots()
    for kind in kinds_in(frame):
        colour, _ = look_of(kind)
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
    legend_below(figure, ax, 4)


@styled(8.0, 3.6)
def fidelity(figure: Figure, frame: pd.DataFrame) -> None:
    """What each arm loses: L2 on held-out tokens and the CE overhead. Columns: arm, kind, l2,
    ce_overhead_pct."""
    figure.set_figheight(max(3.6, 1.4 + ROW * len(frame)))
    axes = figure.subplots(1, 2, sharey=True)
    places = {arm: -i for i, arm in enumerate(frame.arm)}
    for ax, column in zip(axes, ("l2", "ce_overhead_pct"), strict=True):
        for kind in kinds_in(frame):
            part, (colour, marker) = frame[frame.kind == kind], look_of(kind)
            ax.plot(part[column], part.arm.map(places), marker, color=colour, label=kind)
    axes[0].set(xlabel="L2 (share of unit variance)", yticks=list(places.values()))
    axes[0].set_yticklabels(list(places))
    axes[1].set_xlabel("CE overhead (% of the model's CE)")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


@styled(7.0, 3.8)
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
    add_legend(ax)


@styled(7.0, 3.0)
def time_spent(figure: Figure, frame: pd.DataFrame) -> None:
    """Seconds that each stage of the run took. Columns: stage, seconds."""
    ax = figure.subplots()
    frame = frame.sort_values("seconds")
    bars = ax.barh(frame.stage, frame.seconds, color=SKY)
    ax.bar_label(bars, labels=[f" {s:,.0f} s" for s in frame.seconds])
    ax.set_xlabel("time (s)")
    ax.margins(x=0.12)
    ax.grid(False)


@styled(8.0, 3.6)
def recovery(figure: Figure, frame: pd.DataFrame) -> None:
    """Recovered atoms and blending of a world with known atoms, along λ₂.

    Columns: lambda2 (0: solo), pair (kind of pair), recovered (share of atoms), blending; a row a
    seed. Lines join the means.
    """
    axes = figure.subplots(1, 2)
    settings = sorted(frame.lambda2.unique())
    labels = ["solo" if value == 0 else f"{value:g}" for value in settings]
    for ax, column in zip(axes, ("recovered", "blending"), strict=True):
        for (pair, part), (colour, marker) in zip(frame.groupby("pair"), SERIES, strict=False):
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


@styled(5.6, 3.6)
def phi_against_recovery(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of a dictionary's features against the share of atoms that it recovers.

    Columns: lambda2, kind, mean_abs_phi, recovered, atoms_mean_abs_phi; a row a dictionary.
    """
    ax = figure.subplots()
    for kind in kinds_in(frame):
        colour, marker = look_of(kind)
        part = frame[frame.kind == kind]
        ax.plot(part.recovered, part.mean_abs_phi, marker, color=colour, label=kind)
        for row in part.drop_duplicates("lambda2").itertuples():
            label = "" if row.lambda2 == 0 else f"λ₂ {row.lambda2:g}"
            ax.annotate(label, (row.recovered, row.mean_abs_phi), (5, 4), fontsize=9,
                        textcoords="offset points")  # fmt: skip
    ax.axhline(frame.atoms_mean_abs_phi.mean(), color=PINK, linestyle="--", label="the true atoms")
    ax.set(xlabel="share of atoms recovered", ylabel="mean |φ| of the features")
    add_legend(ax)
