"""The paper's values beside a run's, value by value."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Markdown

from metasae_lib.measure.statistics import Effect, over_seeds
from metasae_lib.show import published as paper
from metasae_lib.show.published import COMPARED, RESULTS, Measured
from metasae_lib.show.tables import paired_changes
from metasae_lib.show.text import between, enumerated, number, percent, table
from metasae_lib.study import ArmSpec, PublishedError, Run

_LATER = "{} is not part of this run"
#: What the notebooks to come may save, one row a published value: id, value, low, high, words; and
#: why a row may have no value.
LATER_TABLES = {
    "autointerp_values": "no judge of this run passed its controls",
    "case_study_values": "a word for Gemma profiles, or too rare in this run's text",
}
#: Why a run may have nothing, by pattern of ids; a later pattern replaces an earlier one.
_WHY_NOT = {
    "*.fuzz*": _LATER.format("04_autointerp"), "*.matched_pairs": _LATER.format("04_autointerp"),
    "*.case.*": _LATER.format("05_case_studies"),
    "*.case.*.fuzz": "fuzzing scores of single features are not compared",
    "*.setup.*": "no part of this run has such a setting",
    "artefact.*": "no notebook has made it",
    "artefact.table-1": "03_cooccurrence has not been run",
    "artefact.table-[2-5]": LATER_TABLES["case_study_values"],
    "artefact.figure-2": _LATER.format("04_autointerp"),
    "artefact.jumprelu-ablation": "the profile trains no JumpReLU arm",
    "artefact.gemma-sweep": "it is the gemma-2-9b profile",
}  # fmt: skip
#: Which formula over the names of `_facts` answers a value, by pattern of ids; behind commas its
#: interval.
_FORMULAS = {
    "*.solo_l2": "solo_l2", "*.baseline_ce_nats": "solo_ce_baseline", "*.dead_solo": "solo_dead",
    "*.solo_ce_*_nats": "solo_ce_overhead_nats", "*.solo_ce_*_pct*": "solo_ce_overhead_pct",
    "*.joint_ce_*_pct": "joint_ce_overhead_pct", "*.dead_joint": "joint_dead",
    "*.l2_increase_absolute": "joint_l2 - solo_l2",
    "*.joint_extra_ce_nats": "joint_ce_overhead_nats - solo_ce_overhead_nats",
    "*.n_pairs": "solo_n_pairs", "*.phi_median": "solo_median", "*.phi_max": "solo_maximum",
    "*.phi_negative_pct": "100 * solo_share_negative",
    "*.solo_mean_abs_phi": "solo_mean_abs, solo_low, solo_high",
    "*.joint_solo_gap": "solo_mean_abs - joint_mean_abs",
    "*.independent_solo_mean_abs_phi": "seeds_mean", "*.independent_solo_spread": "seeds_std",
    "*.welch_t": "welch_t", "*.welch_p_below": "welch_p",
    "*.activation_norm_mean": "norms_mean_all", "*.activation_norm_std": "norms_std_all",
    # The paper's own ratio, units mixed as it mixes them; it keeps position 0.
    "*.solo_l2_over_norm_pct": "100 * solo_l2 / norms_mean_all",
    "*.joint_extra_l2_over_norm_pct": "100 * (joint_l2 - solo_l2) / norms_mean_all",
}  # fmt: skip
#: Which table stands for each artefact of the paper.
_ARTEFACTS = {
    "figure-1a": "figure_1a", "figure-1b": "grid", "figure-2": "figure_2", "table-1": "grid",
    "table-2": "table_2", "table-3": "table_3", "table-4": "table_4", "table-5": "table_5",
    "independent-baseline": "phi", "appendix-a": "thresholds", "appendix-b": "firing_rates",
    "appendix-c": "phi_histogram", "appendix-d": "norms", "jumprelu-ablation": "ablation",
}  # fmt: skip


def paper_against_ours(run: Run, *ids: str, label: str) -> Markdown:
    """The paper's values whose ids match the patterns, beside this run's, with their verdicts.

    Patterns as of a shell (`*.table1.*`). PublishedError if one matches nothing.
    """
    card = run_scorecard(run)
    found = {pattern: fnmatch.filter(card.id, pattern) for pattern in ids}
    for pattern, values in found.items():
        if not values:
            raise PublishedError(f"published.yml has no value that matches {pattern!r}.")
    chosen = card[card.id.isin(set().union(*found.values()))]
    shown = table(scorecard_rows(chosen), f"The paper's values beside those of {run.name}", label)
    return Markdown(f"## Paper against ours\n\n{shown.data}", metadata=shown.metadata)


def scorecard_rows(card: pd.DataFrame) -> pd.DataFrame:
    """Rows of a scorecard as a reader sees them: what was judged with its tolerance."""
    rows = []
    for row in card.to_dict("records"):
        unit = {"1": "", "tokens": "", "%": "%"}.get(row["unit"], f" {row['unit']}")
        printed, ours = row["published"], number(row["ours"])
        if printed.lstrip("-")[:1].isdigit() and "," not in printed:  # a number, not words
            printed = printed.replace("_", ",").replace("-", "−") + unit
        if row["group"] in COMPARED and row["tolerance"] > 0:
            printed += f" ± {number(row['tolerance'], 2)}"
        if not isinstance(row["ours"], str) and ours != "—":
            ours += unit
        if not pd.isna(row["low"]):
            ours += f" ({between(row['low'], row['high'])})"
        if row["seeds"] > 0:
            row["verdict"] += f" ({row['seeds']:.0f} seeds would tell)"
        what = row["what"] + ("" if row["model"] == "gpt2-large" else " (Gemma)")
        rows.append((what, row["where"], printed, ours, number(row["difference"]), row["verdict"]))
    columns = ["value", "where", "paper", "ours (interval)", "difference", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def table_1(run: Run) -> Markdown:
    """The paper's Table 1 with ours beside it: one row a point of its grid."""
    card = run_scorecard(run)
    card = card[card.section == "table 1"].reset_index(drop=True)
    at = card.id.str.extract(r"lambda(.+)-sigma(.+)\.(\w+)$")
    rows = scorecard_rows(card.assign(unit="1", tolerance=0, verdict=card.group))
    at.columns = ["λ₂", "σ²", "column"]
    shown = at[["λ₂", "σ²"]].drop_duplicates(ignore_index=True)
    names = {"d_mean_abs_phi_pct": "Δ mean |φ| %", "d_l2_pct": "Δ L2 %", "ce_pct": "CE %"}
    for column, name in names.items():
        part = rows[at.column == column].reset_index(drop=True)
        shown[[f"{name}, paper", f"{name}, ours"]] = part[["paper", "ours (interval)"]]
        if column == "d_mean_abs_phi_pct":
            shown["verdict on φ"] = part.verdict
    caption = f"Table 1 of the paper (GPT-2 large), and {run.name} beside it"
    return table(shown, caption, "tab-table-1")


def collapsed(run: Run) -> str:
    """That most features never fire of an arm that results compare, in words; empty if they do.

    Results compare joint with solo, and with solo at smaller k. What other methods and the
    ablation leave dead says nothing of these.
    """
    if not run.has_table("phi"):
        return ""
    phi, n = run.load_table("phi"), run.profile.dictionary.n_features
    alive = phi[phi.kind.isin(["solo", "joint", "frontier"])].alive
    if not (alive < n / 2).any():
        return ""
    return f"of {n:,} features only {alive.min():,} to {alive.max():,} ever fire"


def tolerances(card: pd.DataFrame) -> pd.DataFrame:
    """Where the tolerances of the results come from: origin, values, tolerance (from, to)."""
    found = card[card.section.isin(RESULTS) & (card.tolerance > 0)]
    frame = found.groupby("origin", sort=False).tolerance.agg(["size", "min", "max"]).reset_index()
    frame[["min", "max"]] = frame[["min", "max"]].map(lambda value: number(value, 2))
    return frame.set_axis(["where the tolerance comes from", "values", "least", "largest"], axis=1)


def scorecard_sentence(card: pd.DataFrame) -> str:
    """How many of the paper's results this run can judge, and how they stand."""
    results = card[card.section.isin(RESULTS)]
    counts = results.group.value_counts()
    judged = counts.reindex(COMPARED).dropna().astype(int)
    return (
        f"Of the {len(results)} results that the paper prints, this run judges **{judged.sum()}**"
        + (f": {enumerated(f'{n} “{g}”' for g, n in judged.items())}. " if len(judged) else ". ")
        + f"{counts.get(paper.OTHER_MODEL, 0)} are values of another model, "
        f"{counts.get(paper.NOT_RUN, 0)} have no value here."
    )


def run_scorecard(run: Run) -> pd.DataFrame:
    """`published.scorecard` of a run, from the tables that its notebooks have saved so far."""
    published = paper.load_published()
    return paper.scorecard(published, measured(run, published), run.profile.name)


def saved_scorecard(run: Run) -> pd.DataFrame:
    """The scorecard that a run has saved; of a kept run it cannot be made anew.

    A table on disk has lost which values are numbers: what reads as one becomes one again.
    """
    card = run.load_table("scorecard")
    numbers = pd.to_numeric(card.ours, errors="coerce")
    texts = card[["published", "ours"]].fillna("—").astype(str)
    return card.assign(
        published=texts.published,
        ours=numbers.astype(object).where(numbers.notna(), texts.ours.where(card.ours.notna())),
    )


def measured(run: Run, published: paper.Published) -> dict[str, Measured]:
    """What a run has for every published value, or why it has nothing. Computes nothing new."""
    names = ("arms", "phi", "welch", "norms", "grid")
    tables = {name: run.load_table(name) for name in names if run.has_table(name)}
    found = {pattern: Measured(why_not=why_not) for pattern, why_not in _WHY_NOT.items()}
    if not run.has_table("case_study_values"):
        found["artefact.table-[2-5]"] = found["*.case.*"]
    found |= _settings(run) | _artefacts(run)
    facts = _facts(run, tables)
    if "phi" in tables:
        found["*.independent_solo_*"] = Measured(why_not="this profile trains one solo seed")
    for pattern, formulas in _FORMULAS.items():
        try:
            answers: list[Any] = [facts.eval(formula) for formula in formulas.split(", ")]
        except pd.errors.UndefinedVariableError:
            continue  # of a table that this run does not have
        value, *ends = (answer.item() for answer in answers)
        found[pattern] = Measured(value, (ends[0], ends[1]) if ends else None)
    if {"solo_l2", "joint_l2"} <= set(facts):
        found |= _fidelity(run, tables["arms"])
    if "grid" in tables:
        found |= _grid(tables["grid"])
    ours: dict[str, Measured] = {}
    for pattern, mine in found.items():
        ours |= dict.fromkeys(fnmatch.filter(published.values, pattern), mine)
    for name, why_not in LATER_TABLES.items():
        for _, row in run.load_table(name).iterrows() if run.has_table(name) else ():
            value = None if pd.isna(row.value) else float(row.value)
            interval = None if pd.isna(row.low) else (float(row.low), float(row.high))
            words = "" if pd.isna(row.words) else str(row.words)
            scatter = row.get("scatter", math.nan)
            ours[str(row.id)] = Measured(value, interval, words, scatter, why_not=why_not)
    if reason := collapsed(run):
        results = (i for i, value in published.values.items() if value.section in RESULTS)
        ours |= dict.fromkeys(results, Measured(why_not=reason))
    return ours


def _settings(run: Run) -> dict[str, Measured]:
    """The profile's settings under the names that the paper's have."""
    profile, auto = run.profile, run.profile.autointerp
    settings = profile.dictionary.model_dump() | profile.training.model_dump()
    settings |= {
        "d_model": getattr(profile.shape, "d_model", None),
        "n_layers": getattr(profile.shape, "n_layers", None),
        "layer": profile.model.layer,
        "context_length": profile.text.context_length,
        "cooccurrence_tokens": profile.text.roles["scan"],
        "calibration_tokens": profile.text.roles["calibration"],
        "autointerp_tokens": profile.text.roles["contexts"],
        "judge": "lexical" if auto.judge == "lexical" else auto.model.rpartition("/")[2],
        "fuzz_features_per_config": auto.features,
        "optimizer": "Adam",
    }
    found = {}
    for key, value in settings.items():
        if isinstance(value, int | float):
            found[f"*.setup.{key}"] = Measured(value)
        elif value is not None:
            words = value if isinstance(value, str) else ", ".join(map(str, value))
            found[f"*.setup.{key}"] = Measured(words=words)
    return found


def _artefacts(run: Run) -> dict[str, Measured]:
    """The artefacts of the paper that this run has."""
    made = {key: name for key, name in _ARTEFACTS.items() if run.has_table(name)}
    if (
        "jumprelu-ablation" in made
        and not run.load_table("ablation").architecture.eq("JumpReLU").any()
    ):
        del made["jumprelu-ablation"]  # BatchTopK alone is half of it
    return {f"artefact.{key}": Measured(words=f"table {name}") for key, name in made.items()}


def _facts(run: Run, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What there is of the names in `_FORMULAS`, in one row.

    `solo_...` and `joint_...` are the columns of the arms compared at the first seed, `norms_...`
    and `welch_...` those of a table without arms, `seeds_...` what the solo seeds do to mean |φ|.
    """
    seed, facts = run.profile.training.seeds[0], dict[Any, Any]()
    arms = {"solo": ArmSpec("solo", seed), "joint": ArmSpec("joint", seed, *run.profile.selected)}
    for name in ("arms", "phi"):
        for kind, arm in arms.items() if name in tables else ():
            rows = tables[name][tables[name].arm == arm.name].add_prefix(f"{kind}_")
            facts |= next(iter(rows.to_dict("records")), {})
    for name in {"norms", "welch"} & tables.keys():
        facts |= tables[name].head(1).add_prefix(f"{name}_").to_dict("records")[0]
    if "phi" in tables:
        seeds = tables["phi"][tables["phi"].kind == "solo"].mean_abs
        facts |= {"seeds_mean": seeds.mean(), "seeds_std": seeds.std()} if len(seeds) > 1 else {}
    return pd.DataFrame([facts])


def _effect(effect: Effect) -> Measured:
    interval = None if math.isnan(effect.low) else (effect.low, effect.high)
    return Measured(effect.difference, interval, scatter=effect.scatter)


def _fidelity(run: Run, arms: pd.DataFrame) -> dict[str, Measured]:
    """Table 1's L2 and CE, and what the selected setting costs."""
    ours = {"*.table1.*": Measured(why_not="this profile's grid does not have that setting")}
    selected = paper.grid_id(*run.profile.selected)
    for setting, effect in over_seeds(paired_changes(arms, "l2")).items():
        at = f"*.table1.{setting}"
        ours[f"{at}.d_mean_abs_phi_pct"] = Measured(why_not="03_cooccurrence has not been run")
        ours[f"{at}.d_l2_pct"] = _effect(effect)
    joint = arms[arms.kind == "joint"]
    for (lambda2, sigma_sq), same in joint.groupby(["lambda2", "sigma_sq"]):
        at = f"*.table1.{paper.grid_id(lambda2, sigma_sq)}.ce_pct"
        ours[at] = Measured(same.ce_overhead_pct.mean())
    points = paired_changes(arms, "ce_overhead_pct", relative=False)
    ours["*.joint_minus_solo_ce_points"] = _effect(over_seeds(points)[selected])
    return ours | {"*.d_l2_pct_selected": ours[f"*.table1.{selected}.d_l2_pct"]}


def _grid(grid: pd.DataFrame) -> dict[str, Measured]:
    """Table 1's mean |φ|, and the three claims that the paper draws from its grid in words."""
    ours: dict[str, Measured] = {}
    joint, column = grid[grid.kind == "joint"], "d_mean_abs_phi_pct"
    for row in joint.to_dict("records"):
        at = f"*.table1.{paper.grid_id(row['lambda2'], row['sigma_sq'])}.{column}"
        values = (row[name] for name in (column, "low", "high", f"{column}_scatter"))
        ours[at] = _effect(Effect(*values))
    changes = grid[grid.kind == "control"][["d_mean_abs_phi_pct", "d_l2_pct"]]
    if len(changes):
        equal = (changes == 0).all(axis=None)
        moved = f"mean |φ| moves by up to {percent(changes.d_mean_abs_phi_pct.abs().max())}"
        ours["*.lambda0_control"] = Measured(
            words="φ and L2 are those of the solo arm, to the last digit" if equal else moved,
            answer=paper.AGREES if equal else paper.INCONCLUSIVE,
        )
    ours["*.selected"] = _best_setting(joint)
    heavy = joint[joint.lambda2 == 1.0]
    ours["*.lambda1_failure"] = Measured(why_not="this profile's grid has no λ₂ = 1")
    if len(heavy):
        up, down = (heavy.low > 0).all(), (heavy.high < 0).all()
        ours["*.lambda1_failure"] = Measured(
            words="mean |φ| " + ", ".join(map(percent, heavy.d_mean_abs_phi_pct))
            + "; L2 " + ", ".join(map(percent, heavy.d_l2_pct)),
            answer=paper.AGREES if up else paper.DISAGREES if down else paper.INCONCLUSIVE,
        )  # fmt: skip
    return ours


def _best_setting(joint: pd.DataFrame) -> Measured:
    """Which setting lowers mean |φ| most, and whether its interval is clear of the next one's."""
    if len(joint) < 2:
        return Measured(why_not="this profile trains one setting, so it selects nothing")
    best, second = (row for _, row in joint.nsmallest(2, "d_mean_abs_phi_pct").iterrows())
    as_printed, clear = (best.lambda2, best.sigma_sq) == (0.3, 1.0), best.high < second.low
    answer = paper.AGREES if as_printed else paper.DISAGREES
    return Measured(
        words=f"λ₂ {best.lambda2:g}, σ² {best.sigma_sq:g}" + ("" if clear else " (not clearly)"),
        answer=answer if clear else paper.INCONCLUSIVE,
    )
