"""The tables that notebooks save and show, from what the measures return."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from metasae_lib.measure.statistics import Effect, feature_difference, seed_difference
from metasae_lib.show.published import grid_id, load_published
from metasae_lib.show.scorecard import CHANGES
from metasae_lib.show.text import between, cell, plain, table
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import MeasureError
from metasae_lib.study.profile import Profile, repository_folders
from metasae_lib.study.run import Run

if TYPE_CHECKING:
    from metasae_lib.measure.counting import Counts
    from metasae_lib.measure.phi import PhiSummary


def open_run(profile: str, overrides: Mapping[str, Any], runs_dir: str) -> Run:
    """The run that a notebook's three parameters name.

    A relative `runs_dir` counts from the notebooks' folder, wherever the kernel was started: in
    JupyterLab that is the working directory, with papermill alone it often is not.
    """
    folders = repository_folders("notebooks")
    base = folders[0] if folders else Path.cwd()
    return Run.open(Profile.load(profile, overrides or None), (base / runs_dir).resolve())


def flattening(history: pd.DataFrame) -> pd.Series:
    """Change of each arm's mean L2, in percent, from the last tenth but one to the last tenth.

    Columns of `history`: arm, step, l2.
    """
    end = history.step.max()
    last = history[history.step > 0.9 * end].groupby("arm").l2.mean()
    before = history[(history.step > 0.8 * end) & (history.step <= 0.9 * end)]
    return 100 * (last / before.groupby("arm").l2.mean() - 1)


def time_spent(run: Run) -> pd.DataFrame:
    """Seconds by stage, as the run's artefacts record them. Columns: stage, seconds."""
    frame = pd.DataFrame(run.stages(), columns=["stage", "seconds"])
    return frame.groupby("stage", sort=False).seconds.sum().reset_index()


def compared_arms(run: Run) -> tuple[str, str]:
    """Names of the two arms of the headline: solo and selected joint, at the first seed."""
    seed = run.profile.training.seeds[0]
    solo, joint = ArmSpec("solo", seed), ArmSpec("joint", seed, *run.profile.selected)
    missing = {solo, joint} - set(run.profile.arms())
    if missing:
        raise MeasureError(
            f"run {run.name} trains no {missing.pop().kind} arm: add it to training.arms to compare"
        )
    return solo.name, joint.name


def phi_table(
    arms: pd.DataFrame,
    counts: Mapping[str, Counts],
    phi: Mapping[str, PhiSummary],
    replicates: Mapping[str, Any],
) -> pd.DataFrame:
    """One row an arm: everything that belongs beside a mean |φ|.

    `arms`: columns arm, kind, seed, lambda2, sigma_sq. `replicates`: bootstrapped mean |φ| of each
    arm (`statistics.bootstrap_mean_abs`); low and high are mean |φ| ± 1.96 of their deviation.
    """
    rows = []
    for arm in arms.arm:
        one, reach = phi[arm], 1.96 * replicates[arm].std(ddof=1)
        rows.append(
            {
                "mean_abs": one.mean_abs,
                "low": one.mean_abs - reach,
                "high": one.mean_abs + reach,
                "null_mean_abs": one.null_mean_abs,
                "noise_floor": one.noise_floor,
                "l0": one.l0,
                "alive": int(counts[arm].alive.sum()),
                "n_pairs": one.n_pairs,
                "n_undefined": one.n_undefined,
                "mean": one.mean,
                "median": one.median,
                "share_negative": one.share_negative,
                "maximum": one.maximum,
                "std_abs": one.std_abs,
                "sum_sq": one.sum_sq,
            }
        )
    return pd.concat([arms.reset_index(drop=True), pd.DataFrame(rows)], axis=1)


def grid_changes(
    run: Run, phi: pd.DataFrame, fidelity: pd.DataFrame, replicates: Mapping[str, Any]
) -> pd.DataFrame:
    """Every arm against the solo arm of its seed (other solo arms: against the first), in percent.

    Columns: arm, kind, seed, lambda2, sigma_sq, d_mean_abs_phi_pct with low and high over features,
    d_l2_pct, ce_overhead_pct, selected.
    """
    both = phi.merge(fidelity[["arm", "l2", "ce_overhead_pct"]], on="arm").set_index("arm")
    first = run.profile.training.seeds[0]
    rows = []
    for arm, row in both.iterrows():
        base = f"solo-seed{first if row.kind == 'solo' else row.seed}"
        if base not in both.index or base == arm:
            continue
        effect = feature_difference(
            row.mean_abs - both.mean_abs[base], replicates[base], replicates[str(arm)]
        )
        if row.kind == "control" and effect.difference == 0:
            effect = Effect(0.0, 0.0, 0.0)  # the same dictionary: its features are not other ones
        scale = 100 / both.mean_abs[base]
        rows.append(
            {
                **row[["kind", "seed", "lambda2", "sigma_sq", "ce_overhead_pct"]],
                "arm": arm,
                "d_mean_abs_phi_pct": scale * effect.difference,
                "low": scale * effect.low,
                "high": scale * effect.high,
                "d_l2_pct": 100 * (row.l2 / both.l2[base] - 1),
                "selected": (row.lambda2, row.sigma_sq) == run.profile.selected,
            }
        )
    return pd.DataFrame(rows)


def effects(run: Run, phi: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """The headline under each way to compare: by seed over features, then over seeds.

    Columns: comparison, change_pct, low, high. The last row, with at least two seeds a side, holds
    all joint seeds of the selected setting against all solo ones, with Welch's t interval over
    seeds; the row before it the first joint arm against the *other* solo seeds, as §5.1 could have.
    """
    chosen = grid[(grid.kind == "joint") & grid.selected]
    rows = [
        (f"seed {row.seed}, over features", row.d_mean_abs_phi_pct, row.low, row.high)
        for row in chosen.itertuples()
    ]
    solo = phi[phi.kind == "solo"].mean_abs.to_numpy()
    joint = phi[phi.arm.isin(chosen.arm)].mean_abs.to_numpy()
    if len(solo) > 1:
        others, one = solo[1:].mean(), phi[phi.arm == chosen.arm.iloc[0]].iloc[0]
        ends = (100 * (value / others - 1) for value in (one.mean_abs, one.low, one.high))
        rows.append(("first joint, other solo seeds", *ends))
    if len(solo) > 1 and len(joint) > 1:
        over = seed_difference(solo.tolist(), joint.tolist())
        scale = 100 / solo.mean()
        low, high = (scale * end for end in over.t_interval)
        rows.append(("all seeds, over seeds", scale * over.difference, low, high))
    return pd.DataFrame(rows, columns=["comparison", "change_pct", "low", "high"])


def phi_rows(phi: pd.DataFrame) -> pd.DataFrame:
    """The columns of `phi_table` that a reader needs first; mean |φ|, its null (the same rates,
    independent) and the noise floor in thousandths."""
    columns = ["mean_abs", "low", "high", "null_mean_abs", "noise_floor"]
    mean_abs, low, high, null, floor = (1e3 * phi[column] for column in columns)
    return pd.DataFrame(
        {
            "arm": phi.arm,
            "10³ mean |φ|": mean_abs,
            "95%": [between(a, b) for a, b in zip(low, high, strict=True)],
            "null": null,
            "floor": floor,
            "φ < 0": [f"{100 * v:.1f}%" for v in phi.share_negative],
            "largest": phi.maximum,
            "L0": phi.l0,
            "living": phi.alive,
        }
    )


def by_rarer(by_rate: pd.DataFrame) -> pd.DataFrame:
    """`PhiSummary.by_rate` by the rarer feature of a pair: rate, mean_abs, null_mean_abs."""
    weighted = by_rate[["mean_abs", "null_mean_abs"]].mul(by_rate.n_pairs, axis=0)
    sums = weighted.assign(n_pairs=by_rate.n_pairs).groupby(by_rate.group_a).sum()
    means = sums[["mean_abs", "null_mean_abs"]].div(sums.n_pairs, axis=0)
    return means.assign(rate=by_rate.groupby("group_a").rate_a.first()).reset_index(drop=True)


def paper_grid() -> pd.DataFrame:
    """The paper's Table 1 as points: lambda2, sigma_sq, d_l2_pct, d_mean_abs_phi_pct."""
    published = load_published()
    points = [(lambda2, sigma_sq) for lambda2 in (0.1, 0.3, 1.0) for sigma_sq in (0.3, 1.0, 3.0)]
    rows = [
        (*point, *(published[f"gpt2-large.table1.{grid_id(*point)}.{key}"] for key in CHANGES))
        for point in points
    ]
    return pd.DataFrame(rows, columns=["lambda2", "sigma_sq", *CHANGES])


def paired_changes(run: Run, frame: pd.DataFrame, column: str) -> pd.Series:
    """The selected joint arms against the solo arm of the same seed: change in percent, by seed.

    Columns of `frame`: kind, seed, lambda2, sigma_sq and the named one.
    """
    lambda2, sigma_sq = run.profile.selected
    solo = frame[frame.kind == "solo"].set_index("seed")[column]
    joint = frame[
        (frame.kind == "joint") & (frame.lambda2 == lambda2) & (frame.sigma_sq == sigma_sq)
    ].set_index("seed")[column]
    return (100 * (joint / solo - 1)).dropna()


def seed_spread(frame: pd.DataFrame, column: str) -> float:
    """Largest difference between two solo seeds in percent; nan with one seed."""
    values = frame[frame.kind == "solo"][column]
    return 100 * (values.max() / values.min() - 1) if len(values) > 1 else math.nan


def both_modes(run: Run, arms: pd.DataFrame) -> Markdown:
    """Fidelity at the thresholds beside that of the training form, on the same held-out text."""
    names = {
        "arm": "arm", "l2": "L2", "l2_batch": "L2, training", "l0_threshold": "L0",
        "l0_batch": "L0, training", "ce_overhead_pct": "CE %",
        "ce_overhead_batch_pct": "CE %, training",
    }  # fmt: skip
    rows = min(run.profile.model.batch_rows, run.profile.evaluation.ce_rows)
    caption = (
        f"Held-out text at fixed thresholds, and in training mode (its CE: the first {rows} rows)"
    )
    return table(arms[list(names)].rename(columns=names), caption, "tab-modes", "wide")


def ablation(run: Run, arms: pd.DataFrame) -> pd.DataFrame:
    """The configurations of the JumpReLU ablation that the run has (§4).

    arms: columns arm, kind, seed, lambda2, sigma_sq, k, l2, l0_threshold, ce_overhead_pct. Columns
    of the result: arm, architecture, penalty, k, l0, l2, ce_overhead_pct.
    """
    first = run.profile.training.seeds[0]
    plain = arms.lambda2.isna()
    selected = (arms.lambda2 == run.profile.selected[0]) & (
        arms.sigma_sq == run.profile.selected[1]
    )
    found = arms[
        arms.kind.isin(["solo", "joint", "batchtopk", "jumprelu"])
        & (arms.seed == first)
        & (plain | selected)
    ]
    return pd.DataFrame(
        {
            "arm": found.arm,
            "architecture": np.where(found.kind == "jumprelu", "JumpReLU", "BatchTopK"),
            "penalty": np.where(found.lambda2.isna(), "solo", "joint"),
            "k": found.k.fillna(run.profile.dictionary.k).astype(int),
            "l0": found.l0_threshold,
            "l2": found.l2,
            "ce_overhead_pct": found.ce_overhead_pct,
        }
    ).reset_index(drop=True)


def competitors(run: Run, arms: pd.DataFrame) -> Markdown:
    """L2 and CE of the arms that are neither solo, joint, control nor part of the ablation."""
    known = ["solo", "joint", "control", "batchtopk", "jumprelu"]
    others = arms[~arms.kind.isin(known)]
    if others.empty:
        return Markdown(
            "**This run trains none of them**: add `ortsae`, `matched-fidelity`, `as-released` or "
            "`critic` to `training.arms`."
        )
    shown = pd.concat([arms[arms.arm.isin(compared_arms(run))], others])
    shown = shown[["arm", "k", "l2", "l0_threshold", "ce_overhead_pct", "dead"]]
    shown = shown.assign(k=shown.k.fillna(run.profile.dictionary.k).astype(int))
    names = {"l2": "L2", "l0_threshold": "L0", "ce_overhead_pct": "CE overhead (%)"}
    return table(shown.rename(columns=names), "Other ways to train, held-out text", "tab-others")


def explained(run: Run, frame: pd.DataFrame) -> Markdown:
    """Decoder variance that a meta SAE explains post hoc. Columns: arm, setting,
    variance_explained."""
    if frame.empty:
        return Markdown(
            "**Not measured in this run**: set `training.meta_posthoc: [bussmann, saebench]`."
        )
    wide = frame.pivot_table(
        index="arm", columns="setting", values="variance_explained", sort=False
    )
    return table(
        wide.reset_index(), "Share of the decoder's variance that a meta SAE explains", "tab-meta"
    )


def provenance(run: Run) -> Markdown:
    """Where the page's numbers come from, as a table."""
    facts = run.provenance()
    rows = {
        "profile": f"{facts['profile']} (hash {facts['profile_hash']})",
        "overrides": plain(facts["overrides"]) or "none",
        "seeds": plain(facts["seeds"]),
        "token ids (hash)": plain(facts["token_hashes"] or "no tokens were needed so far"),
        "commit": plain(facts["commit"]),
        "hardware": plain(facts["hardware"]),
        "libraries": plain(facts["libraries"]),
        "made": facts["date"],
        "time spent on this run's artefacts": f"{facts['run_seconds']:,.0f} s",
    }
    body = "\n".join(f"| {key} | {cell(value)} |" for key, value in rows.items())
    return Markdown(f"## Provenance\n\n| what | value |\n| --- | --- |\n{body}\n")


def downloads(run: Run, *names: str) -> Markdown:
    """Links to the tables behind the page's figures; ArtefactError for one that is not there."""
    folders = repository_folders("notebooks")
    tables = os.path.relpath(run.folder / "tables", folders[0] if folders else Path.cwd())
    lines = [
        f"- [{name}.csv]({tables}/{name}.csv): {', '.join(run.load_table(name).columns)}"
        for name in names
    ]
    return Markdown("## Downloads\n\n" + "\n".join(lines))
