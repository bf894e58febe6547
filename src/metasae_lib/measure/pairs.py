"""Arms of one seed as pairs: what joint training changes, and what less fidelity changes alone.

Arms of one seed start from the same weights and take the same batches, so each is held against the
solo arm of its own seed, feature i against feature i. The simplest rival of the penalty is a solo
dictionary that reconstructs as badly: arms at a smaller k draw a curve of mean |φ| over L2, and a
joint arm is held against that curve at its own L2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from metasae_lib.measure.counting import Counts
from metasae_lib.measure.phi import abs_phi_blocks
from metasae_lib.measure.statistics import (
    Floats,
    bootstrap_mean_abs,
    feature_difference,
    feature_draws,
    over_seeds,
    unpaired_difference,
)
from metasae_lib.study import COMPETITORS, Run

#: What is compared, each in its own column of `pair_table`, and the names of its interval's ends.
COMPARED = {
    "d_mean_abs_phi_pct": ("low", "high"),
    "d_excess_pct": ("excess_low", "excess_high"),
    "d_l2_pct": ("l2_low", "l2_high"),
    "d_ce_points": ("ce_low", "ce_high"),
}
_ABOUT = ["arm", "kind", "seed", "lambda2", "sigma_sq", "k"]


def resampled_mean_abs(run: Run, counts: Mapping[str, Counts]) -> dict[str, Floats]:
    """mean |φ| of every arm in the same resamples of its features, `evaluation.bootstrap` of them.

    Drawn by index, dead features too: see `statistics.bootstrap_mean_abs`. An arm of another width
    has draws of its own.
    """
    widths = {len(each.n1) for each in counts.values()}
    draws = {n: feature_draws(n, run.profile.evaluation.bootstrap) for n in widths}
    return {
        name: bootstrap_mean_abs(abs_phi_blocks(each), draws[len(each.n1)][each.alive])
        for name, each in counts.items()
    }


def pair_table(
    run: Run, phi: pd.DataFrame, fidelity: pd.DataFrame, replicates: Mapping[str, Floats]
) -> pd.DataFrame:
    """Every arm against the solo arm of its own seed (other solo arms: the first), one row each.

    phi, fidelity: a row an arm, with kind, seed, lambda2, sigma_sq, k, mean_abs, null_mean_abs, and
    with l2, ce_overhead_pct. replicates: `resampled_mean_abs`. Columns of the result: those of the
    arm's condition, setting (the arm without its seed), selected, d_mean_abs_phi_pct with low and
    high over features, d_excess_pct (of mean |φ| above its rate-matched null), d_l2_pct, and
    d_ce_points (of the CE overhead in percent).
    """
    arms, rows = _joined(phi, fidelity), []
    solo = arms[arms.kind == "solo"]
    for _, arm in arms.iterrows():
        bases = solo[:1] if arm.kind == "solo" else solo[solo.seed == arm.seed]
        for _, base in bases[bases.arm != arm.arm].iterrows():
            change = _change(arm, base, replicates[arm.arm], replicates[base.arm])
            rows.append(change | {"d_ce_points": arm.ce_overhead_pct - base.ce_overhead_pct})
    return _pairs(run, rows)


def frontier_table(
    run: Run, phi: pd.DataFrame, fidelity: pd.DataFrame, replicates: Mapping[str, Floats]
) -> pd.DataFrame:
    """Joint arms and competitors against the solo curve of their seed at their own L2, a row each.

    The curve joins the solo arm and the `frontier` arms of the seed by straight lines in L2. An arm
    beyond its ends has nan: nothing is extrapolated. Columns as of `pair_table` (d_l2_pct
    and d_ce_points are nan: L2 is equal by construction).
    """
    arms, rows = _joined(phi, fidelity), []
    for _, arm in arms[arms.kind.isin(["joint", *COMPETITORS])].iterrows():
        curve = arms[arms.kind.isin(["solo", "frontier"]) & (arms.seed == arm.seed)]
        if len(curve) < 2:
            continue
        curve = curve.sort_values("l2")
        at = between(curve.l2.to_numpy(), arm.l2)
        base = curve.iloc[0].copy()
        columns = ["mean_abs", "null_mean_abs", "l2"]
        base[columns] = at @ curve[columns].to_numpy(np.float64)
        reference = at @ np.array([replicates[name] for name in curve.arm])
        rows.append(_change(arm, base, replicates[arm.arm], reference) | {"d_l2_pct": np.nan})
    return _pairs(run, rows)


def paired_measures(run: Run, arms: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Any measures of the selected joint arms and of the solo arms of smaller k, as pairs.

    arms: a row an arm: kind, seed, k, lambda2, sigma_sq, l2 and the measures. Columns of the
    result: measure, setting, against (`solo`: the arm of the same seed; `equal L2`: the solo curve
    of the seed at the joint arm's own L2, see `frontier_table`), n_seeds, base (mean of what it is
    held against), change (measure minus base), low and high for new seeds and features, and
    scatter. The setting `solo` has base and scatter alone: what another seed does.
    """
    curves = dict(
        iter(arms[arms.kind.isin(["solo", "frontier"])].sort_values("l2").groupby("seed"))
    )
    solo, joint = arms[arms.kind == "solo"], arms[is_selected(run, arms)]
    groups = {("joint", "solo"): joint, ("joint", "equal L2"): joint}
    for k, same in arms[arms.kind == "frontier"].groupby("k", sort=False):
        groups[f"solo, k = {k:g}", "solo"] = same
    rows: list[tuple[Any, ...]] = []
    for measure in measures:
        own = solo.set_index("seed")[measure]
        rows.append((measure, "solo", "", len(own), own.mean(), 0.0, np.nan, np.nan, own.std()))
        for (setting, against), same in groups.items():
            base = own.reindex(same.seed).to_numpy()
            if against == "equal L2":
                at = zip(same.l2, (curves[seed] for seed in same.seed), strict=True)
                base = np.array([between(c.l2.to_numpy(), l2) @ c[measure] for l2, c in at])
            change = same[measure].to_numpy() - base
            if np.isfinite(change).any():
                mean, e = base[np.isfinite(change)].mean(), over_seeds({"": change})[""]
                seeds = int(np.isfinite(change).sum())
                rows.append((measure, setting, against, seeds, mean, *vars(e).values()))
    columns = ["measure", "setting", "against", "n_seeds", "base", "change", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "scatter"])


def _joined(phi: pd.DataFrame, fidelity: pd.DataFrame) -> pd.DataFrame:
    return phi.merge(fidelity[["arm", "l2", "ce_overhead_pct"]], on="arm")


def between(places: Floats, at: float) -> Floats:
    """Weights of a curve's points, in ascending order, that give its value at a place; nan beyond
    its ends."""
    weights = [np.interp(at, places, point, np.nan, np.nan) for point in np.eye(len(places))]
    return np.array(weights)


def _change(arm: pd.Series, base: pd.Series, ours: Floats, theirs: Floats) -> dict[Any, Any]:
    """An arm against what it is compared with, in percent."""
    effect = feature_difference(arm.mean_abs - base.mean_abs, theirs, ours)
    ends = 100 / base.mean_abs * np.array([effect.difference, effect.low, effect.high])
    excess = (arm.mean_abs - arm.null_mean_abs) / (base.mean_abs - base.null_mean_abs)
    values = dict(zip(("d_mean_abs_phi_pct", "low", "high"), ends.tolist(), strict=True))
    changes = {"d_excess_pct": 100 * (excess - 1), "d_l2_pct": 100 * (arm.l2 / base.l2 - 1)}
    return arm[_ABOUT].to_dict() | values | changes


def _pairs(run: Run, rows: list[dict[Any, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*_ABOUT, "d_mean_abs_phi_pct", "low", "high",
                                        "d_excess_pct", "d_l2_pct", "d_ce_points"])  # fmt: skip
    setting = frame.arm.str.replace(r"-seed\d+$", "", regex=True)
    return frame.assign(
        setting=setting.where(frame.kind != "solo", frame.arm),  # seeds of solo are not pairs
        selected=is_selected(run, frame),
    )


def is_selected(run: Run, arms: pd.DataFrame) -> pd.Series:
    """Which rows are joint arms of the headline's setting. Columns: kind, lambda2, sigma_sq."""
    lambda2, sigma_sq = run.profile.selected
    return (arms.kind == "joint") & (arms.lambda2 == lambda2) & (arms.sigma_sq == sigma_sq)


def setting_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of each setting together: mean over seeds, for new seeds and new features.

    Columns: setting, kind, lambda2, sigma_sq, k, selected, n_seeds; each of `COMPARED` with the
    ends of its interval and, behind its name and "_scatter", the deviation of one pair. The
    scatter is pooled over the settings of a kind (`statistics.over_seeds`). Where no setting of a
    kind has two seeds, mean |φ| keeps its interval over features, and `over` says so.
    """
    rows = []
    for _, same in pairs.groupby("kind", sort=False):
        settings = list(same.groupby("setting", sort=False))
        found = {
            column: over_seeds({name: part[column] for name, part in settings})
            for column in COMPARED
        }
        for name, part in settings:
            first = part.iloc[0]
            row = {"setting": name, "kind": first.kind, "lambda2": first.lambda2,
                   "sigma_sq": first.sigma_sq, "k": first.k, "selected": first.selected,
                   "n_seeds": int(part.d_mean_abs_phi_pct.notna().sum())}  # fmt: skip
            for column, (low, high) in COMPARED.items():
                effect = found[column][name]
                row |= {column: effect.difference, low: effect.low, high: effect.high,
                        f"{column}_scatter": effect.scatter}  # fmt: skip
            row["over"] = "seeds and features"
            if np.isnan(row["low"]):
                row |= {"low": first.low, "high": first.high, "over": "features"}
            rows.append(row)
    return pd.DataFrame(rows)


def effects(phi: pd.DataFrame, pairs: pd.DataFrame, frontier: pd.DataFrame) -> pd.DataFrame:
    """The headline under each way to compare, at the selected setting.

    phi: as for `pair_table`; pairs, frontier: of all arms. Columns: way, comparison (in words),
    change_pct, low, high, scatter, n_seeds. Ways: `features`, a row a seed, the pair of that seed
    over features; `seeds`, all pairs for new seeds and features; `unpaired`, the same arms as if
    they shared nothing; `other seeds`, the first joint arm against the other seeds' solo arms, as
    §5.1 could have; `frontier` and `excess`, the pairs at equal L2 against the solo curve, of mean
    |φ| and of what it has above its null.
    """
    chosen, curve = pairs[pairs.selected], frontier[frontier.selected]
    rows: list[tuple[Any, ...]] = [
        ("features", f"seed {row.seed}: its pair, over features", row.d_mean_abs_phi_pct, row.low,
         row.high, np.nan, 1)
        for row in chosen.itertuples()
    ]  # fmt: skip

    def together(way: str, words: str, frame: pd.DataFrame, column: str) -> None:
        settings = setting_table(frame[frame.kind == "joint"])
        for row in settings[settings.selected].to_dict("records"):
            words += ", over features" if row["over"] == "features" else ""
            ends = (row[end] for end in COMPARED[column])
            rows.append((way, words, row[column], *ends, row[f"{column}_scatter"], row["n_seeds"]))

    if len(chosen) > 1:
        together("seeds", "all pairs, for new seeds and features", pairs, "d_mean_abs_phi_pct")
    solo, joint = phi[phi.kind == "solo"], phi[phi.arm.isin(chosen.arm)]
    scale = 100 / solo.mean_abs.mean()
    if min(len(solo), len(joint)) > 1:
        found = unpaired_difference(solo.mean_abs, joint.mean_abs)
        ends = (scale * end for end in (found.difference, found.low, found.high))
        rows.append(("unpaired", "as if they shared nothing", *ends, np.nan, len(joint)))
    if len(solo) > 1 and len(joint):
        change = 100 * (joint.mean_abs.iloc[0] / solo.mean_abs.iloc[1:].mean() - 1)
        rows.append(("other seeds", "first joint, the other seeds' solo", change, np.nan, np.nan,
                     np.nan, 1))  # fmt: skip
    if curve.d_mean_abs_phi_pct.notna().any():
        together("frontier", "at equal L2, against the solo frontier", frontier,
                 "d_mean_abs_phi_pct")  # fmt: skip
        together("excess", "the same, above the rate-matched null", frontier, "d_excess_pct")
    columns = ["way", "comparison", "change_pct", "low", "high", "scatter", "n_seeds"]
    return pd.DataFrame(rows, columns=columns)
