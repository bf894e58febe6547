"""Sentences drawn from a run's tables: what a page concludes, in words."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pandas as pd
from IPython.display import Markdown

from metasae_lib.show.published import grid_id, load_published
from metasae_lib.show.scorecard import collapsed, scorecard_sentence
from metasae_lib.show.tables import paired_changes, seed_spread
from metasae_lib.show.text import between, enumerated, number, percent
from metasae_lib.study.run import Run

# Notebooks show no progress bars, and tqdm would warn in each of them that it cannot draw its own.
warnings.filterwarnings("ignore", message="IProgress not found")


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


def spread_sentence(choices: pd.DataFrame) -> str:
    """The range of the headline over the choices of `headline_by_choice`, as a sentence."""
    low, high = choices.change_pct.min(), choices.change_pct.max()
    return (
        f"Over these choices the same pair of dictionaries gives a change of mean |φ| between "
        f"{percent(low)} and {percent(high)}"
        + (": **the sign depends on the choice**." if low < 0 < high else ", always of one sign.")
    )


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
            f"of its seed by {enumerated(map(percent, changes))}; the paper has {percent(paper)}."
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
        f"{enumerated(pairs)} for BatchTopK. "
    )
    if not alike.any():
        return text + "So far apart, **their L2 cannot be compared**."
    better = int((l2["BatchTopK"] < l2["JumpReLU"])[alike].sum())
    return text + (
        f"Of the {int(alike.sum())} of {len(wide)} conditions in which the two lie within "
        f"{_ALIKE:.0%}, BatchTopK has the lower L2 in {better} (§4: in both joint and solo)."
    )


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


def in_short(run: Run, card: pd.DataFrame) -> dict[str, Any]:
    """What the book's first page says about a run: `sentences`, and the counts of verdicts."""
    sentences = [scale_of_run(run)]
    if run.has_table("effects"):
        sentences += conclusion(run)
    if run.has_table("arms"):
        arms = run.load_table("arms")
        l2, ce = (paired_changes(run, arms, c) for c in ("l2", "ce_overhead_nats"))
        if len(l2):
            sentences.append(
                f"The price: L2 changes by {enumerated(map(percent, l2))}, the CE overhead by "
                f"{enumerated(map(percent, ce))} (seed by seed)."
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
