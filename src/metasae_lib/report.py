"""What every notebook shows in the same way: tables, the paper beside ours, where it comes from.

Everything returned is IPython Markdown in MyST's dialect, which reads as text in JupyterLab and
becomes headings, numbered tables and links on a page of the book.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from IPython.display import Markdown

from metasae_lib.errors import MeasureError, PublishedError
from metasae_lib.profile import ArmSpec, Profile, repository_folders
from metasae_lib.published import (
    AGREES,
    COMPARED,
    DISAGREES,
    INCONCLUSIVE,
    NOT_RUN,
    OTHER_MODEL,
    RESULTS,
    Measured,
    Published,
    grid_id,
    load_published,
    scorecard,
)
from metasae_lib.run import Run
from metasae_lib.statistics import Effect, feature_difference, seed_difference

if TYPE_CHECKING:
    from metasae_lib.cooccurrence import Counts, PhiSummary

# Notebooks show no progress bars, and tqdm would warn in each of them that it cannot draw its own.
warnings.filterwarnings("ignore", message="IProgress not found")

_CHANGES = ("d_l2_pct", "d_mean_abs_phi_pct")
#: What the notebooks to come may save, one row a published value: id, value, low, high, words; and
#: why a row may have no value.
LATER_TABLES = {
    "autointerp_values": "no judge of this run passed its controls",
    "case_study_values": "a word for Gemma profiles, or too rare in this run's text",
}
#: Which table stands for each artefact of the paper.
_ARTEFACTS = {
    "figure-1a": "figure_1a", "figure-1b": "grid", "table-1": "grid",
    "independent-baseline": "phi", "appendix-a": "thresholds", "appendix-b": "firing_rates",
    "appendix-c": "phi_histogram", "appendix-d": "norms", "jumprelu-ablation": "ablation",
    "figure-2": "figure_2", "table-2": "table_2", "table-3": "table_3", "table-4": "table_4",
    "table-5": "table_5",
}  # fmt: skip


def open_run(profile: str, overrides: Mapping[str, Any], runs_dir: str) -> Run:
    """The run that a notebook's three parameters name.

    A relative `runs_dir` counts from the notebooks' folder, wherever the kernel was started: in
    JupyterLab that is the working directory, with papermill alone it often is not.
    """
    folders = repository_folders("notebooks")
    base = folders[0] if folders else Path.cwd()
    return Run.open(Profile.load(profile, overrides or None), (base / runs_dir).resolve())


def number(value: Any, digits: int = 3) -> str:
    """A number as a reader wants it; words as they are, nothing as a dash.

    `digits` significant ones, whole above 1,000; powers of ten below 0.01; a true minus sign.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "—"
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    size = abs(value)
    if math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif float(value).is_integer() or 1000 <= size < 1e9:
        text = f"{value:,.0f}"
    elif 0.01 <= size < 1000:
        text = f"{value:.{digits}g}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A change in percent with its sign: `−7.5%`."""
    return f"{value:+.1f}%".replace("-", "−")


def between(low: float, high: float, show: Callable[[float], str] = number) -> str:
    """An interval as `low to high`."""
    return f"{show(low)} to {show(high)}"


def table(
    frame: pd.DataFrame, caption: str, label: str, look: Literal["", "filterable", "wide"] = ""
) -> Markdown:
    """A numbered MyST table of a frame; its index is left out.

    look: what it is on a page of the book: `filterable`, with a search box and a choice of verdict;
    `wide`, in small type and with unbroken names, to be scrolled where it does not fit.
    """
    columns = [_cell(c) for c in frame.columns]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(number(value)) for value in row] for row in frame.itertuples(index=False)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    kind = f":class: {look}\n" if look else ""
    return Markdown(f":::{{table}} {caption}\n:name: {label}\n{kind}\n{body}\n:::\n")


def paper_against_ours(run: Run, *ids: str, label: str) -> Markdown:
    """The paper's values whose ids match the patterns, beside this run's, with their verdicts.

    Patterns as of a shell (`*.table1.*`). PublishedError if one matches nothing.
    """
    card = run_scorecard(run)
    for pattern in ids:
        if not any(fnmatch(value_id, pattern) for value_id in card.id):
            raise PublishedError(f"published.yml has no value that matches {pattern!r}.")
    chosen = card[[any(fnmatch(value_id, pattern) for pattern in ids) for value_id in card.id]]
    shown = table(scorecard_rows(chosen), f"The paper's values beside those of {run.name}", label)
    return Markdown(f"## Paper against ours\n\n{shown.data}")


def scorecard_rows(card: pd.DataFrame) -> pd.DataFrame:
    """Rows of a scorecard as a reader sees them: what was judged with its tolerance."""
    rows = []
    for row in card.to_dict("records"):
        ours = number(row["ours"])
        if not isinstance(row["ours"], str) and ours != "—":
            ours += _unit(row)
        if not pd.isna(row["low"]):
            ours += f" ({between(row['low'], row['high'])})"
        paper = _printed(row)
        if row["group"] in COMPARED and row["tolerance"] > 0:
            paper += f" ± {number(row['tolerance'], 2)}"
        rows.append(
            {
                "value": row["what"] if row["model"] == "gpt2-large" else f"{row['what']} (Gemma)",
                "where": row["where"],
                "paper": paper,
                "ours (interval)": ours,
                "difference": number(row["difference"]),
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(rows)


def _unit(row: Mapping[Any, Any]) -> str:
    unit = str(row["unit"])
    return unit if unit == "%" else "" if unit in ("1", "tokens") else f" {unit}"


def _printed(row: Mapping[Any, Any]) -> str:
    """A printed value with its unit; hyphens of numbers as minus signs."""
    text = str(row["published"])
    if text == "—" or not text.lstrip("-")[:1].isdigit() or "," in text:
        return text
    return text.replace("_", ",").replace("-", "−") + _unit(row)


def table_1(run: Run) -> Markdown:
    """The paper's Table 1 with ours beside it: one row a point of its grid."""
    card = run_scorecard(run)
    lines: dict[str, dict[str, str]] = {}
    for row in card[card.section == "table 1"].to_dict("records"):
        setting, _, column = row["id"].partition(".table1.")[2].rpartition(".")
        lambda2, sigma_sq = setting.removeprefix("lambda").split("-sigma")
        line = lines.setdefault(setting, {"λ₂": lambda2, "σ²": sigma_sq})
        name = {"d_mean_abs_phi_pct": "Δ mean |φ| %", "d_l2_pct": "Δ L2 %", "ce_pct": "CE %"}[
            column
        ]
        interval = "" if pd.isna(row["low"]) else f" ({between(row['low'], row['high'])})"
        line[f"{name}, paper"] = _printed({**row, "unit": "1"})
        line[f"{name}, ours"] = number(row["ours"]) + interval
        if column == "d_mean_abs_phi_pct":
            line["verdict on φ"] = row["group"]
    caption = f"Table 1 of the paper (GPT-2 large), and {run.name} beside it"
    return table(pd.DataFrame(lines.values()), caption, "tab-table-1")


def scale_of_run(run: Run) -> str:
    """One sentence that holds the run's size against the paper's."""
    published = load_published()
    tokens = run.profile.training.train_tokens / published["gpt2-large.setup.train_tokens"]
    scan = run.profile.text.roles["scan"] / published["gpt2-large.setup.cooccurrence_tokens"]
    features = run.profile.dictionary.n_features / published["gpt2-large.setup.n_features"]
    shares = ", ".join(
        f"{number(100 * share, 2)}% of its {what}"
        for share, what in ((features, "features"), (tokens, "training tokens"), (scan, "scan"))
    )
    small = min(features, tokens, scan) < 0.5
    return ("This is a **small run**" if small else "This run has the paper's scale") + (
        f": beside the paper's GPT-2 large it has {shares}."
    )


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
        (*point, *(published[f"gpt2-large.table1.{grid_id(*point)}.{key}"] for key in _CHANGES))
        for point in points
    ]
    return pd.DataFrame(rows, columns=["lambda2", "sigma_sq", *_CHANGES])


def spread_sentence(choices: pd.DataFrame) -> str:
    """The range of the headline over the choices of `sensitivity.headline`, as a sentence."""
    low, high = choices.change_pct.min(), choices.change_pct.max()
    return (
        f"Over these choices the same pair of dictionaries gives a change of mean |φ| between "
        f"{percent(low)} and {percent(high)}"
        + (": **the sign depends on the choice**." if low < 0 < high else ", always of one sign.")
    )


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


def fidelity_sentences(run: Run, arms: pd.DataFrame) -> Markdown:
    """What the penalty costs in reconstruction on this model, in words drawn from the table."""
    lambda2, sigma_sq = run.profile.selected
    published = load_published()
    lines = []
    for column, name, paper in (
        ("l2", "L2", published[f"gpt2-large.table1.{grid_id(0.3, 1.0)}.d_l2_pct"]),
        ("ce_overhead_nats", "The CE overhead", 100 * (3.1 / 2.5 - 1)),
    ):
        changes, spread = paired_changes(run, arms, column), seed_spread(arms, column)
        if changes.empty:
            continue
        sentence = (
            f"{name} of the joint arm (λ₂ {lambda2:g}, σ² {sigma_sq:g}) differs from the solo arm "
            f"of its seed by {_list(map(percent, changes))}; the paper has {percent(paper)}."
        )
        if not math.isnan(spread):
            beyond = changes.abs().min() > spread and changes.min() * changes.max() > 0
            sentence += (
                f" Solo seeds differ among themselves by up to {spread:.1f}%, so this is "
                + (
                    "more than what seeds do."
                    if beyond
                    else "**not** clearly more than what seeds do."
                )
            )
        lines.append(sentence)
    dead = arms.groupby("kind", sort=False).dead.agg(["min", "max"])
    shares = [
        f"{kind} {row['min']:,}" + (f" to {row['max']:,}" if row["max"] > row["min"] else "")
        for kind, row in dead.astype(int).iterrows()
    ]
    lines.append(
        f"Dead features (never selected on the calibration text), of "
        f"{run.profile.dictionary.n_features:,}: "
        f"{', '.join(shares)}."
    )
    return Markdown("\n".join(f"- {line}" for line in lines))


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


_ALIKE = 0.1  # difference of L0 up to which L2 is compared


def ablation_sentence(frame: pd.DataFrame) -> str:
    """Which architecture reconstructs better, condition by condition, in one sentence."""
    wide = frame.pivot_table(index=["k", "penalty"], columns="architecture", values=["l2", "l0"])
    if "JumpReLU" not in wide.get("l2", pd.DataFrame()).columns:
        return (
            "**This run trains no JumpReLU arm**: add `ablation` to `training.arms` for all eight "
            "configurations."
        )
    wide = wide.dropna()
    l0, l2 = wide["l0"], wide["l2"]
    pairs = [
        f"{number(there)} against {number(here)}"
        for there, here in zip(l0["JumpReLU"], l0["BatchTopK"], strict=True)
    ]
    alike = (l0["JumpReLU"] / l0["BatchTopK"] - 1).abs() <= _ALIKE
    text = (
        "JumpReLU meets its L0 by a term of the loss, not exactly: its L0 is "
        f"{_list(pairs)} for BatchTopK. "
    )
    if not alike.any():
        return text + "So far apart, **their L2 cannot be compared**."
    better = int((l2["BatchTopK"] < l2["JumpReLU"])[alike].sum())
    return text + (
        f"Of the {int(alike.sum())} of {len(wide)} conditions in which the two lie within "
        f"{_ALIKE:.0%}, BatchTopK has the lower L2 in {better} (§4: in both joint and solo)."
    )


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


def section(title: str, text: str) -> Markdown:
    """A short section of a page, below a `##` heading."""
    return Markdown(f"### {title}\n\n{text}")


def reading(low: float, high: float, published: float) -> str:
    """What an interval of the change of mean |φ| (percent) lets a reader conclude, in a clause."""
    if low > 0:
        return "so on this model mean |φ| rises, against the paper's claim"
    if high < 0:
        size = (
            "and the paper's size lies within the interval"
            if low <= published <= high
            else f"but not the size that the paper prints, {percent(published)}"
        )
        return f"so the direction of the paper's claim is seen here, {size}"
    open_too = low <= published
    return "so this run cannot tell a reduction from none" + (
        f", and does not exclude the paper's {percent(published)} either"
        if open_too
        else f", and excludes the paper's {percent(published)}"
    )


def conclusion(run: Run) -> list[str]:
    """The two sentences that `03_cooccurrence` ends with, from its table of effects."""
    effects = run.load_table("effects")
    published = load_published()[f"gpt2-large.table1.{grid_id(0.3, 1.0)}.d_mean_abs_phi_pct"]
    lambda2, sigma_sq = run.profile.selected
    one, every = effects.iloc[0], effects.iloc[-1]
    model = run.profile.model.source.rpartition(":")[2]
    first = (
        f"On {model}, layer {run.profile.model.layer}, joint training (λ₂ {lambda2:g}, "
        f"σ² {sigma_sq:g}) changes mean |φ| by {percent(one.change_pct)} against the solo "
        f"dictionary of the same seed ({between(one.low, one.high, percent)} over features)"
    )
    if len(effects) > 1:
        first += (
            f", and by {percent(every.change_pct)} over all seeds "
            f"({between(every.low, every.high, percent)})"
        )
    second = reading(every.low, every.high, published)
    if reason := collapsed(run):
        second = f"but {reason}: such dictionaries say nothing for or against the paper"
    return [first + ".", second[0].upper() + second[1:] + "."]


def collapsed(run: Run) -> str:
    """That most features of an arm never fire, in words; empty where they do."""
    if not run.has_table("phi"):
        return ""
    alive, n = run.load_table("phi").alive, run.profile.dictionary.n_features
    if alive.min() >= n / 2:
        return ""
    return f"of {n:,} features only {alive.min():,} to {alive.max():,} ever fire"


def elasticity_sentence(run: Run) -> str:
    """How much a common shift of the thresholds moves mean |φ| in this run."""
    if not run.has_table("elasticity"):
        return "This run has not measured it."
    frame = run.load_table("elasticity")
    low, high = frame.scale.min(), frame.scale.max()
    down, up = (frame[frame.scale == s].change_pct.mean() for s in (low, high))
    return (
        f"In this run, thresholds times {low:g} move mean |φ| by {percent(down)}, "
        f"times {high:g} by {percent(up)} (mean over arms)."
    )


def tolerances(card: pd.DataFrame) -> pd.DataFrame:
    """Where the tolerances of the results come from: origin, values, tolerance (from, to)."""
    found = card[card.section.isin(RESULTS) & (card.tolerance > 0)]
    rows = [
        (origin, len(part), number(part.tolerance.min(), 2), number(part.tolerance.max(), 2))
        for origin, part in found.groupby("origin", sort=False)
    ]
    columns = ["where the tolerance comes from", "values", "least", "largest"]
    return pd.DataFrame(rows, columns=columns)


def scorecard_sentence(card: pd.DataFrame) -> str:
    """How many of the paper's results this run can judge, and how they stand."""
    results = card[card.section.isin(RESULTS)]
    counts = results.group.value_counts()
    judged = [f"{counts[g]} “{g}”" for g in COMPARED if g in counts]
    total = sum(int(counts.get(g, 0)) for g in COMPARED)
    return (
        f"Of the {len(results)} results that the paper prints, this run judges **{total}**"
        + (f": {_list(judged)}. " if judged else ". ")
        + f"{counts.get(OTHER_MODEL, 0)} are values of another model, {counts.get(NOT_RUN, 0)} "
        "have no value here."
    )


def headline(run: Run, card: pd.DataFrame) -> dict[str, Any]:
    """What the book's first page says about a run: `sentences`, and the counts of verdicts."""
    sentences = [scale_of_run(run)]
    if run.has_table("effects"):
        sentences += conclusion(run)
    if run.has_table("arms"):
        arms = run.load_table("arms")
        l2, ce = (paired_changes(run, arms, c) for c in ("l2", "ce_overhead_nats"))
        if len(l2):
            sentences.append(
                f"The price: L2 changes by {_list(map(percent, l2))}, the CE overhead by "
                f"{_list(map(percent, ce))} (seed by seed)."
            )
    if run.has_table("control"):
        equal = run.load_table("control").bit_for_bit
        sentences.append(
            "The control without penalty equals the solo dictionary bit for bit."
            if equal.all()
            else "The control without penalty does **not** equal the solo dictionary."
        )
    sentences.append(scorecard_sentence(card))
    return {"sentences": sentences, "verdicts": card.group.value_counts().to_dict()}


def provenance(run: Run) -> Markdown:
    """Where the page's numbers come from, as a table."""
    facts = run.provenance()
    rows = {
        "profile": f"{facts['profile']} (hash {facts['profile_hash']})",
        "overrides": _plain(facts["overrides"]) or "none",
        "seeds": _plain(facts["seeds"]),
        "token ids (hash)": _plain(facts["token_hashes"] or "no tokens were needed so far"),
        "commit": _plain(facts["commit"]),
        "hardware": _plain(facts["hardware"]),
        "libraries": _plain(facts["libraries"]),
        "made": facts["date"],
        "time spent on this run's artefacts": f"{facts['run_seconds']:,.0f} s",
    }
    body = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
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


def run_scorecard(run: Run) -> pd.DataFrame:
    """`published.scorecard` of a run, from the tables that its notebooks have saved so far."""
    published = load_published()
    return scorecard(published, measured(run, published), run.profile.name)


def measured(run: Run, published: Published) -> dict[str, Measured]:
    """What a run has for every published value, or why it has nothing. Computes nothing new."""
    ours: dict[str, Measured] = {}
    for value_id, value in published.values.items():
        key = value_id.rpartition(".")[2]
        if value.section == "set-up":
            ours[value_id] = _setting(run, key)
        elif value.section == "artefact":
            ours[value_id] = _artefact(run, key)
        elif value.section == "case study":
            ours[value_id] = Measured(
                why_not="fuzzing scores of single features are not compared"
                if key == "fuzz"
                else _later("05_case_studies")
            )
        elif key.startswith("fuzz") or key == "matched_pairs":
            ours[value_id] = Measured(why_not=_later("04_autointerp"))
    for key, mine in {**_fidelity(run), **_cooccurrence(run)}.items():
        ours |= {i: mine for i in published.values if fnmatch(i, key)}
    for name, why_not in LATER_TABLES.items():
        if run.has_table(name):
            rows = run.load_table(name).to_dict("records")
            ours |= {str(row["id"]): _row(row, why_not) for row in rows}
    if reason := collapsed(run):
        for value_id, value in published.values.items():
            if value.section in RESULTS:
                ours[value_id] = Measured(why_not=reason)
    return ours


def _later(notebook: str) -> str:
    return f"{notebook} is not part of this run"


def _row(row: Mapping[Any, Any], why_not: str) -> Measured:
    value = None if pd.isna(row["value"]) else float(row["value"])
    interval = None if pd.isna(row["low"]) else (float(row["low"]), float(row["high"]))
    words = "" if pd.isna(row["words"]) else str(row["words"])
    return Measured(value, interval, words, why_not=why_not)


def _setting(run: Run, key: str) -> Measured:
    profile, shape = run.profile, run.profile.shape
    flat = profile.dictionary.model_dump() | profile.training.model_dump()
    flat |= {
        "layer": profile.model.layer,
        "d_model": shape.d_model if shape else None,
        "n_layers": shape.n_layers if shape else None,
        "context_length": profile.text.context_length,
        "cooccurrence_tokens": profile.text.roles["scan"],
        "calibration_tokens": profile.text.roles["calibration"],
        "autointerp_tokens": profile.text.roles["contexts"],
        "judge": profile.autointerp.judge
        if profile.autointerp.judge == "lexical"
        else profile.autointerp.model.rpartition("/")[2],
        "fuzz_features_per_config": profile.autointerp.features,
        "optimizer": "Adam",
    }
    value = flat.get(key)
    if value is None:
        return Measured(why_not="no part of this run has such a setting")
    if isinstance(value, int | float):
        return Measured(value)
    return Measured(words=value if isinstance(value, str) else ", ".join(map(str, value)))


def _artefact(run: Run, key: str) -> Measured:
    name = _ARTEFACTS.get(key, "")
    made = name and run.has_table(name)
    if made and key == "jumprelu-ablation":  # BatchTopK alone is half of it
        made = "JumpReLU" in run.load_table(name).architecture.to_numpy()
    if made:
        return Measured(words=f"table {name}")
    why = {
        "gemma-sweep": "it is the gemma-2-9b profile",
        "jumprelu-ablation": "the profile trains no JumpReLU arm",
        "figure-2": _later("04_autointerp"),
        "table-1": "03_cooccurrence has not been run",
    }
    late = "no notebook has made it"
    if key.startswith("table-"):
        studied = run.has_table("case_study_values")
        late = LATER_TABLES["case_study_values"] if studied else _later("05_case_studies")
    return Measured(why_not=why.get(key, late))


def _arm(frame: pd.DataFrame, run: Run, kind: str) -> pd.Series | None:
    """The row of the solo or selected joint arm at the first seed."""
    lambda2, sigma_sq = run.profile.selected
    found = frame[(frame.kind == kind) & (frame.seed == run.profile.training.seeds[0])]
    if kind == "joint":
        found = found[(found.lambda2 == lambda2) & (found.sigma_sq == sigma_sq)]
    return None if found.empty else found.iloc[0]


def _fidelity(run: Run) -> dict[str, Measured]:
    """Patterns of ids → what `02_training` measured."""
    if not run.has_table("arms"):
        return {}
    arms = run.load_table("arms")
    solo, joint = _arm(arms, run, "solo"), _arm(arms, run, "joint")
    ours: dict[str, Measured] = {}
    if solo is not None:
        ours |= {
            "*.solo_l2": Measured(solo.l2),
            "*.baseline_ce_nats": Measured(solo.ce_baseline),
            "*.solo_ce_overhead_nats": Measured(solo.ce_overhead_nats),
            "*.solo_ce_increase_nats": Measured(solo.ce_overhead_nats),
            "*.solo_ce_overhead_pct*": Measured(solo.ce_overhead_pct),
            "*.solo_ce_increase_pct": Measured(solo.ce_overhead_pct),
            "*.dead_solo": Measured(solo.dead),
        }
    if joint is not None:
        ours |= {
            "*.joint_ce_overhead_pct": Measured(joint.ce_overhead_pct),
            "*.joint_ce_increase_pct": Measured(joint.ce_overhead_pct),
            "*.dead_joint": Measured(joint.dead),
        }
    if solo is not None and joint is not None:
        ours["*.table1.*"] = Measured(why_not="this profile's grid does not have that setting")
        grid = arms[(arms.kind == "joint") & (arms.seed == solo.seed)]
        for row in grid.to_dict("records"):
            at = f"*.table1.{grid_id(row['lambda2'], row['sigma_sq'])}"
            change = _within(
                100 * (row["l2"] / solo.l2 - 1), 100 / solo.l2 * _scatter(arms.l2, arms)
            )
            ours[f"{at}.d_mean_abs_phi_pct"] = Measured(why_not="03_cooccurrence has not been run")
            ours[f"{at}.d_l2_pct"] = change
            ours[f"{at}.ce_pct"] = Measured(row["ce_overhead_pct"])
            if (row["lambda2"], row["sigma_sq"]) == run.profile.selected:
                ours["*.d_l2_pct_selected"] = change
        points = joint.ce_overhead_pct - solo.ce_overhead_pct
        ours |= {
            "*.l2_increase_absolute": Measured(joint.l2 - solo.l2),
            "*.joint_minus_solo_ce_points": _within(points, _scatter(arms.ce_overhead_pct, arms)),
            "*.joint_extra_ce_nats": Measured(joint.ce_overhead_nats - solo.ce_overhead_nats),
        }
    return ours


def _scatter(column: pd.Series, arms: pd.DataFrame) -> float:
    """95% reach of the difference of two arms that only their seeds tell apart; nan with one."""
    return 1.96 * math.sqrt(2) * float(column[arms.kind == "solo"].std())


def _within(value: float, reach: float) -> Measured:
    return Measured(value, None if math.isnan(reach) else (value - reach, value + reach))


def _cooccurrence(run: Run) -> dict[str, Measured]:
    """Patterns of ids → what `03_cooccurrence` measured."""
    ours: dict[str, Measured] = {}
    if run.has_table("phi"):
        phi = run.load_table("phi")
        solo, joint = _arm(phi, run, "solo"), _arm(phi, run, "joint")
        seeds = phi[phi.kind == "solo"].mean_abs
        if len(seeds) > 1:
            ours["*.independent_solo_mean_abs_phi"] = Measured(seeds.mean())
            ours["*.independent_solo_spread"] = Measured(seeds.std())
        else:
            why = Measured(why_not="this profile trains one solo seed")
            ours["*.independent_solo_*"] = why
        if solo is not None:
            ours |= {
                "*.solo_mean_abs_phi": Measured(solo.mean_abs, (solo.low, solo.high)),
                "*.n_pairs": Measured(solo.n_pairs),
                "*.phi_negative_pct": Measured(100 * solo.share_negative),
                "*.phi_median": Measured(solo["median"]),
                "*.phi_max": Measured(solo.maximum),
            }
        if solo is not None and joint is not None:
            ours["*.joint_solo_gap"] = Measured(solo.mean_abs - joint.mean_abs)
    if run.has_table("welch"):
        welch = run.load_table("welch").iloc[0]
        ours |= {"*.welch_t": Measured(welch.t), "*.welch_p_below": Measured(welch.p)}
    if run.has_table("norms"):
        norms = run.load_table("norms").iloc[0]
        ours |= {
            "*.activation_norm_mean": Measured(norms.mean_all),
            "*.activation_norm_std": Measured(norms.std_all),
        }
        if run.has_table("arms"):
            arms = run.load_table("arms")
            solo, joint = _arm(arms, run, "solo"), _arm(arms, run, "joint")
            if solo is not None and joint is not None:
                # The paper's own ratio, units mixed as it mixes them; it keeps position 0.
                extra = 100 * (joint.l2 - solo.l2) / norms.mean_all
                ours |= {
                    "*.solo_l2_over_norm_pct": Measured(100 * solo.l2 / norms.mean_all),
                    "*.joint_extra_l2_over_norm_pct": Measured(extra),
                }
    if run.has_table("grid"):
        phi = run.load_table("phi")
        mean = float(phi[phi.kind == "solo"].mean_abs.mean())
        by_seed = 100 * _scatter(phi.mean_abs, phi) / mean
        ours |= _grid(run, run.load_table("grid"), by_seed)
    return ours


def _grid(run: Run, grid: pd.DataFrame, seeds: float) -> dict[str, Measured]:
    """Table 1's mean |φ|, and the three claims that the paper draws from its grid in words.

    seeds: 95% reach of what seeds alone change, in percent.
    """
    ours: dict[str, Measured] = {}
    joint = grid[(grid.kind == "joint") & (grid.seed == run.profile.training.seeds[0])]
    for row in joint.to_dict("records"):
        at = f"*.table1.{grid_id(row['lambda2'], row['sigma_sq'])}"
        # Two ways to be wrong, other features and other seeds, added in quadrature.
        reach = math.hypot((row["high"] - row["low"]) / 2, 0 if math.isnan(seeds) else seeds)
        ours[f"{at}.d_mean_abs_phi_pct"] = _within(row["d_mean_abs_phi_pct"], reach)
    control = grid[grid.kind == "control"]
    if len(control):
        equal = bool((control.d_mean_abs_phi_pct == 0).all() and (control.d_l2_pct == 0).all())
        largest = control.d_mean_abs_phi_pct.abs().max()
        ours["*.lambda0_control"] = Measured(
            words="φ and L2 are those of the solo arm, to the last digit"
            if equal
            else f"mean |φ| moves by up to {percent(largest)}",
            answer=AGREES if equal else INCONCLUSIVE,
        )
    ours["*.selected"] = _best_setting(joint)
    heavy = joint[joint.lambda2 == 1.0]
    ours["*.lambda1_failure"] = Measured(why_not="this profile's grid has no λ₂ = 1")
    if len(heavy):
        up, down = (heavy.low > 0).all(), (heavy.high < 0).all()
        ours["*.lambda1_failure"] = Measured(
            words="mean |φ| " + ", ".join(map(percent, heavy.d_mean_abs_phi_pct))
            + "; L2 " + ", ".join(map(percent, heavy.d_l2_pct)),
            answer=AGREES if up else DISAGREES if down else INCONCLUSIVE,
        )  # fmt: skip
    return ours


def _best_setting(joint: pd.DataFrame) -> Measured:
    """Which setting lowers mean |φ| most, and whether its interval is clear of the next one's."""
    if len(joint) < 2:
        return Measured(why_not="this profile trains one setting, so it selects nothing")
    best, second = (row for _, row in joint.nsmallest(2, "d_mean_abs_phi_pct").iterrows())
    paper = (best.lambda2, best.sigma_sq) == (0.3, 1.0)
    clear = best.high < second.low
    return Measured(
        words=f"λ₂ {best.lambda2:g}, σ² {best.sigma_sq:g}" + ("" if clear else " (not clearly)"),
        answer=(AGREES if paper else DISAGREES) if clear else INCONCLUSIVE,
    )


def _list(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> str:
    """Nested facts in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_plain(v) for v in value) or "none"
    return str(value)
