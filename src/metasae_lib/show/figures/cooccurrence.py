"""Figures of thresholds, φ and what moves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from metasae_lib.show.figures import style

#: The paper's headline in percent; drawn for scale where something else moves mean |φ|.
HEADLINE = -7.5
_HEADLINES = {"the paper, −7.5%": HEADLINE, "its four seeds, −2.3%": -2.3}


@style.styled(7.0, 3.8)
def threshold_calibration(ax: Axes, frame: pd.DataFrame) -> None:
    """Appendix A: how often BatchTopK selects a feature, against how often it fires above its
    threshold on other text. Columns: kind, selected_rate, scan_rate (per token)."""
    seen = frame[(frame.selected_rate > 0) & (frame.scan_rate > 0)]
    for _, part, look in style.by_kind(seen, alpha=0.35, markersize=3, markeredgewidth=0):
        ax.plot(part.selected_rate, part.scan_rate, **look)
    ends = [seen.selected_rate.min(), seen.selected_rate.max()]
    ax.plot(ends, ends, color=style.GREY, linewidth=1, label="equal")
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="rate selected on calibration text", ylabel="rate above θ on scan text")
    for handle in ax.legend().legend_handles:
        if handle is not None:
            handle.set_alpha(1)


@style.styled(7.0, 3.8)
def density_difference(ax: Axes, frame: pd.DataFrame) -> None:
    """Figure 1a: density of φ in the joint arm minus that in the solo arm.

    Columns: phi (bin centre), width, difference (per unit of φ), and low, high: the same between
    solo seeds, or NaN with one seed.
    """
    ax.fill_between(
        frame.phi, frame.low, frame.high, color=style.GREY, alpha=0.35, step="mid", linewidth=0,
        label="between two solo seeds",
    )  # fmt: skip
    ax.step(frame.phi, frame.difference, where="mid", color=style.BLUE, label="joint − solo")
    style.zero_line(ax)
    ax.set(xlabel="φ", ylabel="difference of density (per unit of φ)")
    # Nearly all pairs lie within a few thousandths of zero: a symlog axis shows tails and peak.
    ax.set_xscale("symlog", linthresh=1e-3)
    peak = frame.difference.abs().max()
    if peak > 0:
        ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(peak / 30)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


@style.styled(7.2, 4.4)
def trade_off(ax: Axes, ours: pd.DataFrame, paper: pd.DataFrame) -> None:
    """Figure 1b: change of mean |φ| against change of L2; colour is σ², size is λ₂.

    `ours`: a row a setting, kind, lambda2, sigma_sq, d_l2_pct, d_mean_abs_phi_pct, low, high
    (interval of the latter), selected (bool). `paper`: lambda2, sigma_sq, d_l2_pct and
    d_mean_abs_phi_pct. The line is the Pareto front of ours; grey is where other solo seeds fall.
    """

    def plot(part: pd.DataFrame, *fmt: str, **look: Any) -> None:
        ax.plot(part.d_l2_pct, part.d_mean_abs_phi_pct, *fmt, **look)

    plot(paper, "D", color=style.RED, mfc="none", markersize=5, label="paper, GPT-2 large")
    plot(ours[ours.kind == "solo"], "o", color=style.GREY, markersize=5, label="another solo seed")
    plot(ours[ours.kind == "control"], "^", color=style.ORANGE, label="control, λ₂ = 0")
    for _, part, look in style.by_kind(ours[~ours.kind.isin(["solo", "control", "joint"])]):
        plot(part, **look)
    joint = ours[ours.kind == "joint"]
    sizes = {value: 4 + 3 * place for place, value in enumerate(sorted(joint.lambda2.unique()))}
    for sigma_sq, part, colour, marker in style.series(joint, "sigma_sq"):
        look = {"color": colour, "capsize": 3, "elinewidth": 0.8, "alpha": 0.5}
        yerr = style.reach(part, "d_mean_abs_phi_pct")
        ax.errorbar(part.d_l2_pct, part.d_mean_abs_phi_pct, yerr, fmt="none", **look)
        for lambda2, same in part.groupby("lambda2"):
            plot(same, marker, color=colour, markersize=sizes[lambda2])
        ax.plot([], [], marker, color=colour, label=f"joint, σ² = {sigma_sq:g}")
    for lambda2, size in sizes.items():
        look = {"color": style.GREY, "mfc": "none", "markersize": size}
        ax.plot([], [], "o", label=f"λ₂ = {lambda2:g}", **look)
    front = pareto_front(joint)
    if len(front) > 1:
        plot(front, color=style.BLACK, linewidth=1, zorder=1)
    best = joint[joint.selected]
    plot(best, "o", mfc="none", mec=style.BLACK, markersize=14, label="selected setting")
    style.zero_line(ax)
    style.zero_line(ax, "x")
    ax.set(xlabel="change of L2 (%)", ylabel="change of mean |φ| (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats in both changes, in the order of d_l2_pct."""
    ordered = frame.sort_values(["d_l2_pct", "d_mean_abs_phi_pct"])
    best = ordered.d_mean_abs_phi_pct.astype(float).cummin()
    return ordered[best < best.shift(fill_value=np.inf)]


@style.styled(7.2, 4.0)
def against_chance(ax: Axes, frame: pd.DataFrame) -> None:
    """mean |φ| of each arm beside what independent features would give.

    Columns: arm, kind, mean_abs, low, high, null_mean_abs (independent features of the same rates),
    noise_floor (√(2/(πn)), from the number of tokens alone).
    """
    y = style.label_rows(ax, list(frame.arm), 4.0, 1.6)
    for _, part, look in style.by_kind(frame.assign(y=y), label=None):
        xerr = style.reach(part, "mean_abs") * 1e3
        ax.errorbar(part.mean_abs * 1e3, part.y, xerr=xerr, capsize=3, **look)
    chance, floor = frame.null_mean_abs * 1e3, frame.noise_floor * 1e3
    ax.plot(chance, y, "v", color=style.PINK, label="same rates, independent")
    ax.plot(
        [floor] * 2, [y - 0.35, y + 0.35], color=style.GREY, linewidth=2,
        label="noise floor √(2/(πn))",
    )  # fmt: skip
    ax.set(xlabel="mean |φ| (thousandths)", xlim=(0, None))
    style.legend_below(ax, 2)


@style.styled(7.2, 3.4)
def effect(ax: Axes, frame: pd.DataFrame, published: Mapping[str, float] = _HEADLINES) -> None:
    """The change of mean |φ| under each way to compare. Columns: comparison, change_pct, low, high.

    `published`: label → percent, drawn as lines.
    """
    y = style.label_rows(ax, list(frame.comparison), 3.4, 1.6)
    xerr = style.reach(frame, "change_pct")
    ax.errorbar(frame.change_pct, y, xerr=xerr, fmt="s", color=style.BLUE, capsize=4)
    for (label, value), dashes in zip(published.items(), ("-", ":"), strict=False):
        ax.axvline(value, color=style.RED, linestyle=dashes, linewidth=1.4, label=label)
    style.zero_line(ax, "x")
    ax.set_xlabel("change of mean |φ|, joint against solo (%)")
    ax.margins(y=0.2)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)


@style.styled(8.0, 4.0, ncols=2)
def firing_rates(axes: NDArray[Any], rates: pd.DataFrame, by_rate: pd.DataFrame) -> None:
    """Appendix B: how often features fire, and mean |φ| at equal rates beside chance.

    `rates`: arm, kind, rate (per token). `by_rate`: arm, kind, rate (centre of the bin, of the
    rarer feature), mean_abs, null_mean_abs.
    """
    left, right = axes
    for _, part, look in style.by_arm(rates[rates.rate > 0], marker="", linewidth=1.3):
        share = np.arange(1, len(part) + 1) / len(part)
        left.step(np.sort(part.rate), share, **look)
    left.set(xscale="log", xlabel="firing rate (per token)", ylabel="share of features below it")
    chance = "same rates, independent"
    for _, part, look in style.by_arm(by_rate, markersize=4, linestyle="-"):
        right.plot(part.rate, part.mean_abs, **look)
        right.plot(part.rate, part.null_mean_abs, "--", color=style.PINK, linewidth=1, label=chance)
    right.set(xscale="log", yscale="log", xlabel="rarer firing rate (per token)")
    right.set_ylabel("mean |φ|")
    style.add_legend(left, left.figure, loc="outside lower left", ncols=4)
    style.add_legend(right, loc="lower right")


@style.styled(8.0, 4.0, ncols=2)
def frontier(axes: NDArray[Any], frame: pd.DataFrame) -> None:
    """mean |φ|, and what it has above chance, over L2: solo curves, and the joint arms.

    Columns: kind, seed, l2, mean_abs, null_mean_abs, selected. A grey line joins the solo arm of a
    seed with its arms of smaller k; a joint arm belongs to the line of its own seed.
    """
    frame = frame.assign(excess=frame.mean_abs - frame.null_mean_abs)
    for ax, column in zip(axes, ("mean_abs", "excess"), strict=True):
        curve = frame[frame.kind.isin(["solo", "frontier"])].sort_values("l2")
        for _, part in curve.groupby("seed"):
            ax.plot(part.l2, 1e3 * part[column], color=style.GREY, linewidth=1, label="one seed")
        for _, part, look in style.by_kind(frame):
            ax.plot(part.l2, 1e3 * part[column], **look | {"markersize": 5})
        best = frame[frame.selected]
        ax.plot(best.l2, 1e3 * best[column], "o", mfc="none", mec=style.BLACK, markersize=11,
                label="selected setting")  # fmt: skip
        ax.set_xlabel("L2 (share of unit variance)")
    axes[0].set_ylabel("mean |φ| (thousandths)")
    axes[1].set_ylabel("mean |φ| above its null (thousandths)")
    style.legend_below(axes[0], 5)


@style.styled(7.0, 3.8)
def clustered(ax: Axes, frame: pd.DataFrame) -> None:
    """How many features are in clusters against solo, by the φ that links two. Columns: arm, kind,
    link, change_pct."""
    for _, part, look in style.by_arm(frame, markersize=4):
        ax.plot(part.link, part.change_pct, **look)
    style.zero_line(ax)
    ax.set(xlabel="least φ of a link", ylabel="features in clusters, against solo (%)")
    style.legend_below(ax, 3)


@style.styled(7.0, 3.6)
def phi_distribution(ax: Axes, frame: pd.DataFrame) -> None:
    """Appendix C: density of φ over all pairs, a line per arm. Columns: arm, kind, phi, density."""
    for _, part, look in style.by_arm(frame[frame.density > 0], marker="", linewidth=1.3):
        ax.step(part.phi, part.density, where="mid", **look)
    style.zero_line(ax, "x")
    ax.set(xlabel="φ", ylabel="density of pairs (per unit of φ)", yscale="log")
    ax.set_xscale("symlog", linthresh=1e-3)
    style.add_legend(ax)


@style.styled(7.0, 3.2)
def activation_norms(ax: Axes, frame: pd.DataFrame) -> None:
    """Appendix D: quantiles of the residual's norm. Columns: quantile (0..1), norm; `mean` and
    `std` repeated."""
    ax.plot(frame.norm, frame["quantile"], color=style.BLUE, label="share of tokens below")
    ax.axvline(frame["mean"].iloc[0], color=style.RED, linestyle="--", label="mean")
    ax.set(xscale="log", xlabel="‖x‖₂ of the residual (model units)", ylabel="share of tokens")
    ax.legend()


@style.styled(7.0, 3.8)
def elasticity(ax: Axes, frame: pd.DataFrame) -> None:
    """How much a common shift of the thresholds moves mean |φ|, with the paper's −7.5% for scale.

    Columns: arm, kind, scale (of θ), change_pct (against scale 1).
    """
    for _, part, look in style.by_arm(frame, markersize=4):
        ax.plot(part.scale, part.change_pct, **look)
    ax.axhspan(HEADLINE, 0, color=style.RED, alpha=0.12, linewidth=0)
    ax.axhline(HEADLINE, color=style.RED, label="the paper’s −7.5%")
    style.zero_line(ax)
    ax.set(xlabel="every threshold θ times", ylabel="change of mean |φ| (%)")
    style.legend_below(ax, 4)
