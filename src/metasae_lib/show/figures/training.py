"""Figures of the penalty, of training and of the synthetic world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray

from metasae_lib.show.figures import style


@style.styled(8.0, 3.4, ncols=2)
def penalty_profile(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """Eq. 2 and its slope along the distance r of a row to its reconstruction.

    Columns: r, sigma_sq, penalty, push (the length of the gradient). The peak of each push stands
    at r = σ/√2.
    """
    left, right = axes
    for sigma_sq, part, colour, _ in style.series(frame, "sigma_sq"):
        left.plot(part.r, part.penalty, color=colour, label=f"σ² = {sigma_sq:g}")
        right.plot(part.r, part.push, color=colour)
        peak = part[part.push == part.push.max()]
        right.plot(peak.r, peak.push, "o", color=colour)
    for ax, label in ((left, "penalty p(r)"), (right, "push |dp/dr|")):
        ax.set(xlabel="distance r between row and reconstruction", ylabel=label)
        ax.set(xlim=(0, frame.r.max()), ylim=(0, None))
    left.legend()


@style.styled(7.0, 3.6)
def escape(ax: Axes, frame: pd.DataFrame) -> None:
    """Angle of a row to its fixed reconstruction while it follows the push.

    Columns: step, angle (degrees), sigma_sq, lambda2; one panel per λ₂.
    """
    panels = frame.groupby("lambda2")
    axes = ax.figure.subplots(1, panels.ngroups, sharey=True, squeeze=False)[0]
    ax.remove()
    for ax, (lambda2, panel) in zip(axes, panels, strict=True):
        for sigma_sq, part, colour, _ in style.series(panel, "sigma_sq"):
            ax.plot(part.step, part.angle, color=colour, label=f"σ² = {sigma_sq:g}")
        ax.set(xlabel="gradient step", title=f"λ₂ = {lambda2:g}")
    axes[0].set_ylabel("angle between row and Ŵ (degrees)")
    axes[0].legend()


@style.styled(5.6, 5.0)
def push_2d(ax: Axes, field: pd.DataFrame, rows: pd.DataFrame) -> None:
    """The push in the plane, and what is left of it on unit rows.

    `field`: x, y, u, v, penalty on a square grid (u, v = minus the gradient). `rows`: x, y, u, v
    on the unit circle (u, v = its tangential part). Reconstruction at (`what_x`, `what_y`) of
    `field`.
    """
    side = round(len(field) ** 0.5)
    grid = {name: field[name].to_numpy().reshape(side, side) for name in ("x", "y", "penalty")}
    shade = ax.contourf(grid["x"], grid["y"], grid["penalty"], levels=12, cmap="Blues", alpha=0.75)
    ax.figure.colorbar(shade, ax=ax, label="penalty p", shrink=0.8)
    step = max(side // 14, 1)
    thin = field[(field.index % side % step == 0) & (field.index // side % step == 0)]
    arrows = thin.x, thin.y, thin.u, thin.v
    ax.quiver(*arrows, color=style.GREY, width=0.003, scale=22, label="push in the plane")
    ax.quiver(
        rows.x, rows.y, rows.u, rows.v, color=style.RED, width=0.006, scale=12, zorder=3,
        label="push on unit rows",
    )  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color=style.BLACK, linewidth=1)
    what = field.what_x[0], field.what_y[0]
    ax.plot(*what, "*", color=style.ORANGE, markersize=15, label="Ŵ", mec=style.BLACK)
    ax.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    ax.grid(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


@style.styled(5.6, 5.2, subplot_kw={"projection": "3d"})
def push_3d(ax: Axes3D, rows: pd.DataFrame) -> None:
    """Unit rows in space, pushed out of the plane that the meta dictionary spans.

    Columns: x, y, z, u, v, w (the tangential push), penalty.
    """
    turn = np.linspace(0, 2 * np.pi, 100)
    rim = np.stack([np.cos(turn), np.sin(turn), np.zeros(100)], axis=1)
    ax.add_collection3d(Poly3DCollection([rim], fc=style.ORANGE, ec=style.ORANGE, alpha=0.35))
    dots = ax.scatter(
        rows.x, rows.y, rows.z, c=rows.penalty, cmap="Blues", vmin=0, vmax=1, edgecolor=style.BLACK,
        linewidth=0.4, s=28, depthshade=False,
    )  # fmt: skip
    ax.quiver(rows.x, rows.y, rows.z, rows.u, rows.v, rows.w, color=style.RED, linewidth=1)
    ax.figure.colorbar(dots, ax=ax, label="penalty p", shrink=0.6, pad=0.1)
    ax.set(xlabel="in the plane", ylabel="in the plane", zlabel="out of the plane")
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], zticks=[-1, 0, 1])
    ax.view_init(elev=18, azim=-60)
    ax.set_box_aspect((1, 1, 1), zoom=0.9)


@style.styled(7.0, 3.6)
def training_curve(ax: Axes, frame: pd.DataFrame, column: str, label: str) -> None:
    """One quantity of every arm along the training tokens.

    Columns: arm, kind, tokens, and the named one. Arms of a kind share a colour.
    """
    _along_training(ax, frame, column, label)
    style.legend_below(ax, 4)


@style.styled(8.0, 3.8, ncols=2)
def losses(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """L2 of the training batches, and features that do not fire, of every arm. Columns: arm, kind,
    tokens, l2, dead."""
    _along_training(axes[0], frame, "l2", "L2 (share of unit variance)")
    axes[0].set_yscale("log")
    # Plain numbers: a loss rarely spans more than one power of ten.
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(ScalarFormatter())
    _along_training(axes[1], frame, "dead", "features not firing at present")
    style.legend_below(axes[0], 4)


def _along_training(ax: Axes, frame: pd.DataFrame, column: str, label: str) -> None:
    for kind, part, look in style.by_arm(frame, marker="", linewidth=1.3):
        ax.plot(part.tokens / 1e6, part[column], zorder=3 if kind == "control" else 2, **look)
    ax.set(xlabel="training tokens (millions)", ylabel=label)


@style.styled(8.0, 3.6, ncols=2, sharey=True)
def fidelity(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """What each arm loses: L2 on held-out tokens and CE, in percent of the model's. Columns: arm,
    kind, l2, ce_overhead_pct."""
    frame = frame.assign(y=style.label_rows(axes[0], list(frame.arm), 3.6, 1.4))
    for _, part, look in style.by_kind(frame):
        axes[0].plot(part.l2, part.y, **look)
        axes[1].plot(part.ce_overhead_pct, part.y, **look)
    axes[0].set_xlabel("L2 (share of unit variance)")
    axes[1].set_xlabel("CE overhead (%)")
    style.legend_below(axes[1], 4)


@style.styled(8.0, 3.6, ncols=2, sharey=True)
def fidelity_pairs(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """What each setting costs against its solo partner. Columns: setting, kind, d_l2_pct, l2_low,
    l2_high, d_ce_nats, ce_low, ce_high."""
    frame = frame.assign(y=style.label_rows(axes[0], list(frame.setting), 3.6, 1.4))
    for _, part, look in style.by_kind(frame):
        for ax, column, ends in (
            (axes[0], "d_l2_pct", ["l2_low", "l2_high"]),
            (axes[1], "d_ce_nats", ["ce_low", "ce_high"]),
        ):
            xerr = style.reach(part, column, ends)
            ax.errorbar(part[column], part.y, xerr=xerr, capsize=3, elinewidth=1, **look)
    for ax, label in zip(axes, ("change of L2 (%)", "change of CE (nats)"), strict=True):
        style.zero_line(ax, "x")
        ax.set_xlabel(label)
    style.legend_below(axes[1], 4)


@style.styled(7.2, 3.6)
def same_features(ax: Axes, frame: pd.DataFrame) -> None:
    """Cosines of decoder rows between dictionaries: feature i with feature i, and with the nearest.

    Columns: comparison, of (`row` or `nearest`), cosine, least, largest.
    """
    names = frame.comparison + np.where(frame.of == "row", ", row by row", ", nearest row")
    frame = frame.assign(y=style.label_rows(ax, list(names), 3.6, 1.2))
    for of, part, colour, marker in style.series(frame, "of", sort=False):
        xerr = style.reach(part, "cosine", ["least", "largest"])
        label = {"row": "feature i with feature i", "nearest": "with the nearest of all"}[of]
        ax.errorbar(part.cosine, part.y, xerr=xerr, fmt=marker, color=colour, capsize=3,
                    label=label)  # fmt: skip
    style.zero_line(ax, "x")
    ax.set(xlabel="mean cosine of decoder rows", xlim=(-0.05, 1.02))
    style.legend_below(ax, 2)


@style.styled(8.0, 3.4, ncols=2)
def makeup(axes: NDArray[Any], shares: pd.DataFrame, norms: pd.DataFrame) -> None:
    """What the residual is made of. `shares`: dimension, share, varying, trained, the last row all
    other dimensions. `norms`: position, norm."""
    left, right = axes
    names = [f"{d}" if d >= 0 else "others" for d in shares.dimension]
    places = np.arange(len(names))
    for offset, (column, colour, label) in enumerate((
        ("share", style.GREY, "of z"), ("varying", style.SKY, "of z around its mean"),
        ("trained", style.BLUE, "of what training sees"),
    )):  # fmt: skip
        left.bar(places + 0.27 * (offset - 1), shares[column], 0.27, color=colour, label=label)
    left.set_xticks(places, names, rotation=60)
    left.set(xlabel="dimension of the residual", ylabel="share of the mean square", ylim=(0, 1))
    left.legend()
    right.plot(norms.position, norms.norm, color=style.BLUE)
    right.set(xlabel="position in the row", ylabel="mean ‖x‖₂ (model units)", ylim=(0, None))


@style.styled(7.0, 3.8)
def ablation(ax: Axes, frame: pd.DataFrame) -> None:
    """BatchTopK against JumpReLU: held-out L2 over L0, solo and joint.

    Columns: architecture, penalty (solo or joint), l0, l2. Lines join what differs in k alone.
    """
    arms = frame.sort_values("l0").groupby(["architecture", "penalty"], sort=False)
    for (architecture, penalty), part in arms:
        colour, marker = (style.BLUE, "s") if architecture == "BatchTopK" else (style.ORANGE, "^")
        dashes, fill = ("-", "full") if penalty == "solo" else (style.DASHES, "none")
        ax.plot(
            part.l0, part.l2, marker, color=colour, linestyle=dashes, fillstyle=fill,
            linewidth=1.2, markersize=7, label=f"{architecture}, {penalty}",
        )  # fmt: skip
    ax.set(xlabel="L0 at the thresholds (features a token)", ylabel="L2 (share of unit variance)")
    style.add_legend(ax)


@style.styled(7.0, 3.0)
def time_spent(ax: Axes, frame: pd.DataFrame) -> None:
    """Seconds that each stage of the run took. Columns: stage, seconds."""
    frame = frame.sort_values("seconds")
    bars = ax.barh(frame.stage, frame.seconds, color=style.SKY)
    ax.bar_label(bars, labels=[f" {s:,.0f} s" for s in frame.seconds])
    ax.set_xlabel("time (s)")
    ax.margins(x=0.12)
    ax.grid(False)


@style.styled(8.0, 3.6, ncols=2)
def recovery(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """Recovered atoms and blending of a world with known atoms, along λ₂.

    Columns: lambda2 (0: solo), pair (kind of pair), recovered (share of atoms), blending; a row a
    seed. Lines join the means.
    """
    settings = sorted(frame.lambda2.unique())
    labels = ["solo" if value == 0 else f"{value:g}" for value in settings]
    for ax, column in zip(axes, ("recovered", "blending"), strict=True):
        for pair, part, colour, marker in style.series(frame, "pair"):
            at = [settings.index(value) for value in part.lambda2]
            ax.plot(at, part[column], marker, color=colour, alpha=0.35, markersize=5)
            mean = part.groupby("lambda2")[column].mean()
            ax.plot(range(len(settings)), mean, marker + "-", color=colour, label=pair)
        ax.set_xticks(range(len(settings)), labels)
        ax.set_xlabel("λ₂")
    axes[0].set(ylabel="share of atoms recovered", ylim=(-0.03, 1.03))
    axes[1].set_ylabel("blending with the pair's other atom")
    axes[1].axhline(0.5, color=style.BLACK, linewidth=0.8, linestyle=":")
    axes[1].legend()


@style.styled(5.6, 3.6)
def phi_against_recovery(ax: Axes, frame: pd.DataFrame) -> None:
    """mean |φ| of a dictionary's features against the share of atoms that it recovers.

    Columns: lambda2, kind, mean_abs_phi, recovered, atoms_mean_abs_phi; a row a dictionary.
    """
    for _, part, look in style.by_kind(frame):
        ax.plot(part.recovered, part.mean_abs_phi, **look)
        for row in part[part.lambda2 != 0].drop_duplicates("lambda2").itertuples():
            ax.annotate(f"λ₂ {row.lambda2:g}", (row.recovered, row.mean_abs_phi), (5, 4),
                        textcoords="offset points", fontsize=9)  # fmt: skip
    atoms = frame.atoms_mean_abs_phi.mean()
    ax.axhline(atoms, color=style.PINK, linestyle="--", label="the true atoms")
    ax.set(xlabel="share of atoms recovered", ylabel="mean |φ| of the features")
    style.add_legend(ax)


@style.styled(8.0, 3.8, ncols=2)
def recovery_at_l2(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """F1 and MCC of dictionaries on SynthSAEBench over their L2; a line joins the solo and frontier
    arms of a seed. Columns: kind, seed, l2, f1, mcc."""
    curves = frame[frame.kind.isin(["solo", "frontier"])].sort_values("l2")
    names = {"f1": "F1 of features as detectors of atoms", "mcc": "MCC (mean |cosine|, matched)"}
    for ax, (column, label) in zip(axes, names.items(), strict=True):
        for _, curve in curves.groupby("seed"):
            ax.plot(curve.l2, curve[column], color=style.GREY, linewidth=0.8)
        for _, part, look in style.by_kind(frame):
            ax.plot(part.l2, part[column], **look)
        ax.set(xlabel="L2 (mean square error a dimension)", ylabel=label)
    style.legend_below(axes[0], 5)
