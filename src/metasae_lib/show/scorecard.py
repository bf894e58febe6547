"""The paper's values beside a run's, value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import pandas as pd
from IPython.display import Markdown

from metasae_lib.show.published import (
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
from metasae_lib.show.text import between, enumerated, number, percent, table
from metasae_lib.study.errors import PublishedError
from metasae_lib.study.run import Run

CHANGES = ("d_l2_pct", "d_mean_abs_phi_pct")
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


def collapsed(run: Run) -> str:
    """That most features of an arm never fire, in words; empty where they do."""
    if not run.has_table("phi"):
        return ""
    alive, n = run.load_table("phi").alive, run.profile.dictionary.n_features
    if alive.min() >= n / 2:
        return ""
    return f"of {n:,} features only {alive.min():,} to {alive.max():,} ever fire"


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
        + (f": {enumerated(judged)}. " if judged else ". ")
        + f"{counts.get(OTHER_MODEL, 0)} are values of another model, {counts.get(NOT_RUN, 0)} "
        "have no value here."
    )


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
