"""The tables that notebooks save and show, from what the measures return."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from metasae_lib.measure import Counts, PhiSummary, noise_floor, null_mean_abs, setting_table
from metasae_lib.measure.pairs import is_selected
from metasae_lib.measure.statistics import paired_difference
from metasae_lib.show.published import grid_id, load_published
from metasae_lib.show.text import between, literal, number, percent, plain, section, signed, table
from metasae_lib.study import COMPETITORS, ArmSpec, MeasureError, Profile, Run, repository_folders
from metasae_lib.study.kept import KeptRun, kept_runs
from metasae_lib.train import Arm


def open_run(profile: str, overrides: Mapping[str, Any], runs_dir: str) -> Run:
    """The run that a notebook's three parameters name.

    A relative `runs_dir` counts from the notebooks' folder, wherever the kernel was started: in
    JupyterLab that is the working directory, with papermill alone it often is not.
    """
    runs = (_notebooks() / runs_dir).resolve()
    return Run.open(Profile.load(profile, overrides or None), runs)


def finished_run(profile: str, overrides: Mapping[str, Any], runs_dir: str) -> Run:
    """`open_run` for a notebook that only reads tables: where none of the run has been made yet,
    the kept run of the profile, if there is one."""
    run = open_run(profile, overrides, runs_dir)
    if not any((run.folder / "tables").iterdir()):
        for folder in repository_folders("results"):
            if (folder / run.name / "manifest.json").exists():
                return KeptRun(folder / run.name)
    return run


def _notebooks() -> Path:
    return next(iter(repository_folders("notebooks")), Path.cwd())


def flattening(history: pd.DataFrame) -> pd.Series:
    """Change of each arm's mean L2, in percent, from the last tenth but one to the last tenth.

    Columns of `history`: arm, step, l2.
    """
    end = history.step.max()
    last = history[history.step > 0.9 * end].groupby("arm").l2.mean()
    before = history[(history.step > 0.8 * end) & (history.step <= 0.9 * end)]
    return 100 * (last / before.groupby("arm").l2.mean() - 1)


def last_steps(history: pd.DataFrame) -> Markdown:
    """The last row of each arm's training record. Columns of `history`: arm, those of its spec and
    of `Arm.history`."""
    names = {"lambda2": "λ₂", "sigma_sq": "σ²", "l2": "L2", "penalty": "mean p"}
    columns = ["arm", *list(names)[:2], "seed", "step", "l2", "l0", "dead", "penalty", "meta_l2"]
    last = history.groupby("arm", sort=False).tail(1)[columns].rename(columns=names)
    caption = "The arms at the end of training (one batch, training mode)"
    return table(last, caption, "tab-arms", "wide")


def controls(arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Weights of every control against those of the solo arm of its seed, where there is one.

    Columns: control, solo, largest_difference (over all weights), bit_for_bit.
    """
    rows = []
    for name, arm in arms.items():
        solo = f"solo-seed{arm.spec.seed}"
        if arm.spec.kind == "control" and solo in arms:
            a, b = arm.sae, arms[solo].sae
            gaps = (getattr(a, w) - getattr(b, w) for w in ("W_enc", "W_dec", "b_dec"))
            largest = max(gap.abs().max().item() for gap in gaps)
            rows.append((name, solo, largest, torch.equal(a.W_dec, b.W_dec)))
    return pd.DataFrame(rows, columns=["control", "solo", "largest_difference", "bit_for_bit"])


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


_PHI_COLUMNS = (
    "mean_abs", "low", "high", "null_mean_abs", "noise_floor", "l0", "alive", "n_pairs",
    "n_undefined", "mean", "median", "share_negative", "maximum", "std_abs", "sum_sq",
)  # fmt: skip


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
    rows = [[getattr(phi[arm], c, None) for c in _PHI_COLUMNS] for arm in arms.arm]
    found = pd.DataFrame(rows, columns=_PHI_COLUMNS)
    reach = np.array([1.96 * replicates[arm].std(ddof=1) for arm in arms.arm])
    found["low"], found["high"] = found.mean_abs - reach, found.mean_abs + reach
    found["alive"] = [int(counts[arm].alive.sum()) for arm in arms.arm]
    return pd.concat([arms.reset_index(drop=True), found], axis=1)


def phi_rows(phi: pd.DataFrame) -> Markdown:
    """The columns of `phi_table` that a reader needs first; mean |φ|, its null (the same rates,
    independent) and the noise floor in thousandths."""
    shown = pd.DataFrame(
        {
            "arm": phi.arm,
            "10³ mean |φ|": 1e3 * phi.mean_abs,
            "95%": [between(*ends) for ends in zip(1e3 * phi.low, 1e3 * phi.high, strict=True)],
            "null": 1e3 * phi.null_mean_abs,
            "floor": 1e3 * phi.noise_floor,
            "φ < 0": [f"{100 * v:.1f}%" for v in phi.share_negative],
            "largest": phi.maximum,
            "L0": phi.l0,
            "living": phi.alive,
        }
    )
    caption = (
        "φ over all pairs of living features, every arm; mean |φ| with its interval over features, "
        "its null (independent features of the same rates) and the noise floor in thousandths"
    )
    return table(shown, caption, "tab-phi", "wide")


def by_rarer(by_rate: pd.DataFrame) -> pd.DataFrame:
    """`PhiSummary.by_rate` by the rarer feature of a pair: rate, mean_abs, null_mean_abs."""
    weighted = by_rate[["mean_abs", "null_mean_abs"]].mul(by_rate.n_pairs, axis=0)
    sums = weighted.assign(n_pairs=by_rate.n_pairs).groupby(by_rate.group_a).sum()
    means = sums[["mean_abs", "null_mean_abs"]].div(sums.n_pairs, axis=0)
    return means.assign(rate=by_rate.groupby("group_a").rate_a.first()).reset_index(drop=True)


def frontier_points(run: Run, phi: pd.DataFrame, fidelity: pd.DataFrame) -> pd.DataFrame:
    """The arms of the solo curves, of the joint grid and of competitors over L2 and mean |φ|.

    Columns: arm, kind, seed, k, lambda2, sigma_sq, selected, l2, mean_abs, null_mean_abs.
    """
    frame = phi[phi.kind.isin(["solo", "frontier", "joint", *COMPETITORS])]
    frame = frame.merge(fidelity[["arm", "l2"]], on="arm")
    frame["selected"] = is_selected(run, frame)
    columns = ["arm", "kind", "seed", "k", "lambda2", "sigma_sq", "selected", "l2", "mean_abs"]
    return frame[[*columns, "null_mean_abs"]]


def paired_rows(
    changes: pd.DataFrame, measures: Mapping[str, str], caption: str, label: str
) -> Markdown:
    """`measure.paired_measures` for reading: a row a measure, its name from `measures`.

    Solo with the deviation between its seeds, then a column for each comparison, with its interval.
    """
    rows = []
    for measure, name in measures.items():
        row = {"": name}
        for one in changes[changes.measure == measure].to_dict("records"):
            if one["setting"] == "solo":
                base, scatter = number(one["base"]), number(one["scatter"])
                row["solo (between seeds)"] = f"{base} (± {scatter})"
                continue
            rival = "solo" if one["against"] == "solo" else "solo at its L2"
            ends = between(one["low"], one["high"])
            row[f"{one['setting']} − {rival}"] = f"{number(one['change'])} ({ends})"
        rows.append(row)
    return table(pd.DataFrame(rows), caption, label, "wide")


def paper_grid() -> pd.DataFrame:
    """The paper's Table 1 as points: lambda2, sigma_sq, d_l2_pct, d_mean_abs_phi_pct."""
    published, columns = load_published(), ["d_l2_pct", "d_mean_abs_phi_pct"]
    rows = [
        (*point, *(published[f"gpt2-large.table1.{grid_id(*point)}.{key}"] for key in columns))
        for point in product((0.1, 0.3, 1.0), (0.3, 1.0, 3.0))
    ]
    return pd.DataFrame(rows, columns=["lambda2", "sigma_sq", *columns])


def paired_changes(
    frame: pd.DataFrame, column: str, relative: bool = True
) -> dict[str, pd.Series[float]]:
    """Every joint setting minus the solo arm of the same seed, by seed; in percent if relative.

    Columns of `frame`: kind, seed, lambda2, sigma_sq and the named one. By `published.grid_id`.
    """
    solo = frame[frame.kind == "solo"].set_index("seed")[column]
    changes = {}
    for (lambda2, sigma_sq), same in frame[frame.kind == "joint"].groupby(["lambda2", "sigma_sq"]):
        joint = same.set_index("seed")[column]
        change = 100 * (joint / solo - 1) if relative else joint - solo
        changes[grid_id(lambda2, sigma_sq)] = change.dropna()
    return changes


def _selected(run: Run, frame: pd.DataFrame) -> pd.Series:
    """Which rows have the selected λ₂ and σ²."""
    lambda2, sigma_sq = run.profile.selected
    return (frame.lambda2 == lambda2) & (frame.sigma_sq == sigma_sq)


def both_modes(run: Run, arms: pd.DataFrame) -> Markdown:
    """Fidelity at the thresholds beside that of the training form, on the same held-out text."""
    names = {
        "arm": "arm", "l2": "L2", "fvu": "FVU", "l2_batch": "L2, training", "l0_threshold": "L0",
        "l0_batch": "L0, training", "ce_overhead_pct": "CE %",
        "ce_overhead_batch_pct": "CE %, training",
    }  # fmt: skip
    rows = min(run.profile.model.batch_rows, run.profile.evaluation.ce_rows)
    at = f"Held-out text at fixed thresholds, and in training mode (its CE: the first {rows} rows)"
    return table(arms[list(names)].rename(columns=names), at, "tab-modes", "wide")


def ablation(run: Run, arms: pd.DataFrame) -> pd.DataFrame:
    """The configurations of the JumpReLU ablation that the run has (§4).

    arms: columns arm, kind, seed, lambda2, sigma_sq, k, l2, l0_threshold, ce_overhead_pct. Columns
    of the result: arm, architecture, penalty, k, l0, l2, ce_overhead_pct.
    """
    found = arms[
        arms.kind.isin(["solo", "joint", "batchtopk", "jumprelu"])
        & (arms.seed == run.profile.training.seeds[0])
        & (arms.lambda2.isna() | _selected(run, arms))
    ]
    found = found.rename(columns={"l0_threshold": "l0"}).assign(
        architecture=np.where(found.kind == "jumprelu", "JumpReLU", "BatchTopK"),
        penalty=np.where(found.lambda2.isna(), "solo", "joint"),
        k=found.k.fillna(run.profile.dictionary.k).astype(int),
    )
    columns = ["arm", "architecture", "penalty", "k", "l0", "l2", "ce_overhead_pct"]
    return found[columns].reset_index(drop=True)


def competitors(run: Run, arms: pd.DataFrame) -> Markdown:
    """L2 and CE of the arms that are neither solo, joint, control nor part of the ablation."""
    others = arms[~arms.kind.isin(["solo", "joint", "control", "batchtopk", "jumprelu"])]
    if others.empty:
        return Markdown(
            "**This run trains none of them**: add `ortsae`, `matryoshka`, `as-released` or "
            "`critic` to `training.arms`."
        )
    shown = pd.concat([arms[arms.arm.isin(compared_arms(run))], others])
    given = shown.kind.isin(list(run.profile.training.given))
    shown = shown.assign(k=shown.k.fillna(run.profile.dictionary.k).mask(given))
    names = {"arm": "arm", "k": "k", "l2": "L2", "l0_threshold": "L0",
             "ce_overhead_pct": "CE overhead (%)", "dead": "dead"}  # fmt: skip
    shown = shown[list(names)].rename(columns=names)
    return table(shown, "Other ways to train, held-out text", "tab-others")


def beside_competitors(phi: pd.DataFrame, grid: pd.DataFrame, frontier: pd.DataFrame) -> Markdown:
    """The selected setting and other methods against solo, pair by pair and at equal L2.

    phi: `phi_table`. grid: `measure.setting_table` of every pair. frontier:
    `measure.frontier_table`.
    """
    title = "The penalty and its competitors"
    found = grid[grid.selected | grid.kind.isin(COMPETITORS)].set_index("setting")
    if not found.kind.isin(COMPETITORS).any():
        return section(
            title,
            "**This run trains no competitor**: add `ortsae` or `matryoshka` to `training.arms`.",
        )
    equal = setting_table(frontier).reindex(columns=grid.columns).set_index("setting")
    equal = equal.reindex(found.index)
    living = phi.assign(
        setting=phi.arm.str.replace(r"-seed\d+$", "", regex=True),
        solo=phi.seed.map(phi[phi.kind == "solo"].set_index("seed").alive),
    ).groupby("setting")[["alive", "solo"]].mean()  # fmt: skip

    def with_interval(frame: pd.DataFrame) -> list[str]:
        return [
            "—" if np.isnan(change) else f"{percent(change)} ({between(low, high, percent)})"
            for change, low, high in frame[["d_mean_abs_phi_pct", "low", "high"]].to_numpy(float)
        ]

    shown = pd.DataFrame(
        {
            "setting": found.index,
            "seeds": found.n_seeds,
            "Δ mean |φ|": with_interval(found),
            "... above its null": found.d_excess_pct.map(percent),
            "Δ L2": found.d_l2_pct.map(percent),
            "Δ CE overhead (points)": found.d_ce_points.map("{:+.1f}".format),
            "Δ mean |φ| at equal L2": with_interval(equal),
            "... above its null ": equal.d_excess_pct.map(percent, na_action="ignore"),
            "living": living.alive,
            "living, solo": living.solo,
        },
        index=found.index,
    )
    caption = (
        "Each setting against the solo arm of its seed, with 95% intervals (of one seed: over its "
        "features), and against the solo curve at its own L2 (— where it lies beyond the curve)"
    )
    return section(title, table(shown, caption, "tab-competitors", "wide").data)


def explained(run: Run, frame: pd.DataFrame) -> Markdown:
    """Decoder variance that a meta SAE explains post hoc. Columns: arm, setting,
    variance_explained."""
    if frame.empty:
        return Markdown(
            "**Not measured in this run**: set `training.meta_posthoc: [bussmann, saebench]`."
        )
    wide = frame.pivot_table("variance_explained", "arm", "setting", sort=False).reset_index()
    return table(wide, "Share of the decoder's variance that a meta SAE explains", "tab-meta")


def compared_scores(compared: pd.DataFrame) -> Markdown:
    """`interpret.compare_all` for reading: three digits, and intervals in brackets."""
    shown = compared[["judge", "against", "pairs", "score", "n"]].copy()
    for column, low, high in (("delta", "low", "high"), ("higher", "higher_low", "higher_high")):
        ends = compared[[column, low, high]].map("{:.3f}".format).replace("-", "−", regex=True)
        shown[column] = ends[column] + " (" + ends[low] + " to " + ends[high] + ")"
    shown[["base", "joint", "t", "d"]] = compared[["base", "joint", "t", "d"]]
    caption = (
        "Joint minus what it is held against (base): t and effect size d over pairs, as the paper "
        "has them; the paired difference (delta) with its 95% interval, for new seeds and features "
        "where there are several seeds; and the share of pairs in which joint is higher (ties left "
        "out)"
    )
    return table(shown, caption, "tab-compared", "wide")


def sentences_and_lists(both: pd.DataFrame) -> Markdown:
    """Ten features with a sentence and a token list, and what the judge makes of all of them.

    both: `interpret.against_lists`; if it is empty, those of a kept run are shown, and named.
    """
    whose = ""
    if both.empty:
        found = {
            run.name: run.load_table("autointerp_explainers") for run in _kept_with_sentences()
        }
        if not found:
            return Markdown(
                "The explanations of this run are token lists; `autointerp.explainer` can have a "
                "language model write sentences."
            )
        name, both = next(iter(found.items()))
        whose = f" of the kept run {name}"
    wide = both.pivot(index="feature", columns="explainer")
    said = ", ".join(
        f"{name} {_moved(wide[name].sentence - wide[name].list)}"
        for name in ("fuzzing", "spearman", "detection")
    )
    parts = {
        f"{name}, {column}": wide[column, name]
        for column in ("explanation", "fuzzing")
        for name in ("sentence", "list")
    }
    shown = pd.DataFrame(parts).reset_index().head(10)
    caption = f"A sentence against a token list over {len(wide)} features{whose}: {said}"
    return table(shown, caption, "tab-explainers", "wide")


def _moved(differences: pd.Series) -> str:
    """The mean of paired differences (nan: no pair) with its interval, as far as there are any."""
    paired = differences.dropna()
    if paired.empty:
        return "of no feature with both"
    effect, show = paired_difference(paired), partial(signed, form="+.3f")
    interval = f" ({between(effect.low, effect.high, show)})" if len(paired) > 1 else ""
    return show(effect.difference) + interval


def _kept_with_sentences() -> Iterator[Run]:
    """The kept runs in which a language model wrote the explanations."""
    for folder in repository_folders("results"):
        for run in kept_runs(folder):
            name = "autointerp_explainers"
            if run.has_table(name) and len(run.load_table(name)):
                yield run


def noise_floors(scans: Mapping[str, int], rate: float) -> pd.DataFrame:
    """mean |φ| of independent features by tokens scanned: its limit, and at one firing rate."""
    rows = [
        (n, scan, noise_floor(n), null_mean_abs(round(rate * n), round(rate * n), n))
        for scan, n in scans.items()
    ]
    floors = ["noise floor √(2/(πN))", "independent at the paper's mean rate"]
    return pd.DataFrame(rows, columns=["tokens", "scan", *floors])


def provenance(run: Run) -> Markdown:
    """Where the page's numbers come from, as a table."""
    facts = run.provenance()
    rows = {
        "profile": f"{facts['profile']} (hash {facts['profile_hash']})",
        "overrides": facts["overrides"] or "none",
        "seeds": facts["seeds"],
        "token ids (hash)": facts["token_hashes"] or "no tokens were needed so far",
        **{key: facts[key] for key in ("commit", "hardware", "libraries")},
        "made": facts["date"],
        "time spent on this run's artefacts": f"{facts['run_seconds']:,.0f} s",
    }
    body = "\n".join(f"| {key} | {literal(plain(value))} |" for key, value in rows.items())
    return Markdown(f"## Provenance\n\n| what | value |\n| --- | --- |\n{body}\n")


def downloads(run: Run, *names: str) -> Markdown:
    """Links to the tables behind the page's figures; ArtefactError for one that is not there."""
    tables = quote(os.path.relpath(run.folder / "tables", _notebooks()))
    lines = [
        f"- [{name}.csv]({tables}/{name}.csv): {', '.join(run.load_table(name).columns)}"
        for name in names
    ]
    return Markdown("## Downloads\n\n" + "\n".join(lines))
