"""Figures of thresholds, φ and what moves it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from metasae_lib.show.figures.style import (
    BLACK,
    BLUE,
    GREY,
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

#: The paper's headline in percent; drawn for scale where something else moves mean |φ|.
HEADLINE = -7.5


@styled(7.0, 3.8)
def threshold_calibration(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix A: how often BatchTopK selects a feature, against how often it fires above its
    threshold on other text. Columns: kind, selected_rate, scan_rate (per token)."""
    ax = figure.subplots()
    seen = frame[(frame.selected_rate > 0) & (frame.scan_rate > 0)]
    for kind in kinds_in(seen):
        part, (colour, marker) = seen[seen.kind == kind], look_of(kind)
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


@styled(7.0, 3.8)
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
    zero_line(ax)
    ax.set(xlabel="φ", ylabel="difference of density (per unit of φ)")
    # Nearly all pairs lie within a few thousandths of zero: a symlog axis shows tails and peak.
    ax.set_xscale("symlog", linthresh=1e-3)
    peak = frame.difference.abs().max()
    if peak > 0:
        ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(peak / 30)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


@styled(7.2, 4.4)
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
    for kind in kinds_in(ours[~ours.kind.isin(["solo", "control", "joint"])]):
        part, (colour, marker) = ours[ours.kind == kind], look_of(kind)
        ax.plot(part.d_l2_pct, part.d_mean_abs_phi_pct, marker, color=colour, label=kind)
    joint = ours[ours.kind == "joint"]
    sizes = {value: 4 + 3 * place for place, value in enumerate(sorted(joint.lambda2.unique()))}
    for (sigma_sq, part), (colour, marker) in zip(joint.groupby("sigma_sq"), SERIES, strict=False):
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
    zero_line(ax)
    zero_line(ax, "x")
    ax.set(xlabel="change of L2 (%)", ylabel="change of mean |φ| (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats in both changes, in the order of d_l2_pct."""
    ordered = frame.sort_values(["d_l2_pct", "d_mean_abs_phi_pct"])
    best = ordered.d_mean_abs_phi_pct.astype(float).cummin()
    return ordered[best < best.shift(fill_value=np.inf)]


@styled(7.2, 4.0)
def against_chance(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of each arm beside what independent features would give.

    Columns: arm, kind, mean_abs, low, high, null_mean_abs (independent features of the same rates),
    noise_floor (√(2/(πn)), from the number of tokens alone).
    """
    figure.set_figheight(max(4.0, 1.6 + ROW * len(frame)))
    ax = figure.subplots()
    for i, (_, row) in enumerate(frame.iterrows()):
        colour, marker = look_of(row.kind)
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
    legend_below(figure, ax, 2)


@styled(7.2, 3.4)
def effect(figure: Figure, frame: pd.DataFrame, published: dict[str, float]) -> None:
    """The change of mean |φ| under each way to compare. Columns: comparison, change_pct, low, high.

    `published`: label → percent, drawn as lines.
    """
    figure.set_figheight(max(3.4, 1.6 + ROW * len(frame)))
    ax = figure.subplots()
    for i, (_, row) in enumerate(frame.iterrows()):
        reach = [[row.change_pct - row.low], [row.high - row.change_pct]]
        ax.errorbar(row.change_pct, -i, xerr=np.array(reach), fmt="s", color=BLUE, capsize=4)
    for (label, value), dashes in zip(published.items(), ("-", ":"), strict=False):
        ax.axvline(value, color=RED, linestyle=dashes, linewidth=1.4, label=label)
    zero_line(ax, "x")
    ax.set_yticks([-i for i in range(len(frame))], list(frame.comparison))
    ax.set_xlabel("change of mean |φ|, joint against solo (%)")
    ax.margins(y=0.2)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)


@styled(7.0, 3.6)
def firing_rates(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix B: share of alive features that fire less often than a rate.

    Columns: arm, kind, rate (per token).
    """
    ax = figure.subplots()
    alive = frame[frame.rate > 0]
    for kind in kinds_in(alive):
        for _, part in alive[alive.kind == kind].groupby("arm"):
            rates = np.sort(part.rate.to_numpy())
            share = np.arange(1, len(rates) + 1) / len(rates)
            dashes = (0, (4, 3)) if kind == "control" else "-"
            ax.step(
                rates, share, color=look_of(kind)[0], linestyle=dashes, label=kind, linewidth=1.3
            )
    ax.set(xscale="log", xlabel="firing rate (per token)", ylabel="share of features below it")
    add_legend(ax)


@styled(7.0, 3.6)
def phi_distribution(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix C: density of φ over all pairs, a line per arm. Columns: arm, kind, phi, density."""
    ax = figure.subplots()
    for kind in kinds_in(frame):
        for _, part in frame[frame.kind == kind].groupby("arm"):
            seen = part[part.density > 0]
            dashes = (0, (4, 3)) if kind == "control" else "-"
            ax.step(seen.phi, seen.density, where="mid", color=look_of(kind)[0], linestyle=dashes,
                    label=kind, linewidth=1.3)  # fmt: skip
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set(xlabel="φ", ylabel="density of pairs (per unit of φ)", yscale="log")
    ax.set_xscale("symlog", linthresh=1e-3)
    add_legend(ax)


@styled(7.0, 3.2)
def activation_norms(figure: Figure, frame: pd.DataFrame) -> None:
    """Appendix D: quantiles of the residual's norm. Columns: quantile (0..1), norm; `mean` and
    `std` repeated."""
    ax = figure.subplots()
    ax.plot(frame.norm, frame["quantile"], color=BLUE, label="share of tokens below")
    ax.axvline(frame["mean"].iloc[0], color=RED, linestyle="--", label="mean")
    ax.set(xscale="log", xlabel="‖x‖₂ of the residual (model units)", ylabel="share of tokens")
    ax.legend()


@styled(7.0, 3.8)
def elasticity(figure: Figure, frame: pd.DataFrame) -> None:
    """How much a common shift of the thresholds moves mean |φ|, with the paper's −7.5% for scale.

    Columns: arm, kind, scale (of θ), change_pct (against scale 1).
    """
    ax = figure.subplots()
    for kind in kinds_in(frame):
        colour, marker = look_of(kind)
        dashes = (0, (4, 3)) if kind == "control" else "-"
        for _, part in frame[frame.kind == kind].groupby("arm"):
            ax.plot(part.scale, part.change_pct, marker=marker, color=colour, linestyle=dashes,
                    label=kind, markersize=4)  # fmt: skip
    ax.axhspan(HEADLINE, 0, color=RED, alpha=0.12, linewidth=0)
    ax.axhline(HEADLINE, color=RED, label="the paper’s −7.5%")
    zero_line(ax)
    ax.set(xlabel="every threshold θ times", ylabel="change of mean |φ| (%)")
    legend_below(figure, ax, 4)


@styled(7.0, 3.6)
def phi_by_rate(figure: Figure, frame: pd.DataFrame) -> None:
    """mean |φ| of pairs by the features' firing rate, beside independent features of that rate.

    Columns: kind, arm, rate (centre of the bin), mean_abs, null_mean_abs.
    """
    ax = figure.subplots()
    for kind in kinds_in(frame):
        colour, marker = look_of(kind)
        for _, part in frame[frame.kind == kind].groupby("arm"):
            ax.plot(part.rate, part.mean_abs, marker + "-", color=colour, label=kind, markersize=4)
            ax.plot(part.rate, part.null_mean_abs, "--", color=PINK, linewidth=1,
                    label="same rates, independent")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="firing rate (per token)", ylabel="mean |φ|")
    add_legend(ax)
