"""Sentences drawn from a run's tables: what a page concludes, in words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown

from metasae_lib.measure.makeup import DOMINATED, FEW
from metasae_lib.measure.statistics import TTest, over_seeds
from metasae_lib.show.published import grid_id, load_published
from metasae_lib.show.scorecard import collapsed, scorecard_sentence
from metasae_lib.show.tables import flattening, paired_changes
from metasae_lib.show.text import (
    between,
    enumerated,
    literal,
    number,
    percent,
    section,
    signed,
    table,
)
from metasae_lib.study import Run

# Notebooks show no progress bars, and tqdm would warn in each of them that it cannot draw its own.
warnings.filterwarnings("ignore", message="IProgress not found")


def scale_of_run(run: Run) -> str:
    """One sentence that holds the run's size against the paper's."""
    profile, published = run.profile, load_published()
    shares = {
        what: ours / published[f"gpt2-large.setup.{key}"]
        for what, ours, key in (
            ("features", profile.dictionary.n_features, "n_features"),
            ("training tokens", profile.training.train_tokens, "train_tokens"),
            ("scan", profile.text.roles["scan"], "cooccurrence_tokens"),
        )
    }
    small = min(shares.values()) < 0.5
    has = ", ".join(f"{number(100 * share, 2)}% of its {what}" for what, share in shares.items())
    scale = "This is a **small run**" if small else "This run has the paper's scale"
    return f"{scale}: beside the paper's GPT-2 large it has {has}."


def headline_choices(choices: pd.DataFrame) -> Markdown:
    """`measure.headline_by_choice` for reading, and the range of the headline in words."""
    shown = choices.rename(columns={"change_pct": "change %"})
    listed = table(shown, "The headline under other choices (first seed)", "tab-choices")
    return Markdown(f"{listed.data}\n{spread_sentence(choices)}")


def spread_sentence(choices: pd.DataFrame) -> str:
    """The range of the headline over the choices of `headline_by_choice`, as a sentence."""
    low, high = choices.change_pct.min(), choices.change_pct.max()
    return (
        f"Over these choices the same pair of dictionaries gives a change of mean |φ| between "
        f"{percent(low)} and {percent(high)}"
        + (": **the sign depends on the choice**." if low < 0 < high else ", always of one sign.")
    )


def flattening_sentence(history: pd.DataFrame) -> str:
    """Whether the loss had stopped moving at the end of training. `history`: see `flattening`."""
    change = flattening(history)
    flat = change.abs().max() < 1
    return (
        "**Has the loss flattened?** Over the last tenth of training, the mean L2 of the arms "
        f"changed by {percent(change.min())} to {percent(change.max())} against the tenth before. "
        + ("That is flat enough to compare arms." if flat else
           "It still moves, so differences between arms may yet change with more tokens.")
    )  # fmt: skip


def makeup_sentence(run: Run, shares: pd.DataFrame) -> str:
    """Whether a few dimensions, or a constant, make most of the residual, and what to do then."""
    few = shares[shares.dimension >= 0].head(FEW)
    start, seen = run.profile.training.start, few.trained.sum()
    text = (
        f"The {len(few)} largest dimensions hold {few.share.sum():.0%} of the mean square of z, "
        f"and one constant vector {shares.mean_share[0]:.0%}. Of what training sees under "
        f"`training.start: {start}` they hold {seen:.0%}"
    )
    if seen < DOMINATED:
        return text + "."
    better = {"zeros": "mean", "mean": "standard"}.get(start)
    cure = f": set `training.start` to `{better}`" if better else ""
    return f"{text}, so **the loss is dominated by {len(few)} dimensions**{cure}."


def fidelity_sentences(run: Run, arms: pd.DataFrame) -> Markdown:
    """What the penalty costs in reconstruction on this model, in words drawn from the table."""
    lambda2, sigma_sq = run.profile.selected
    published = load_published()
    lines = []
    for column, name, paper in (
        ("l2", "L2", published[f"gpt2-large.table1.{grid_id(0.3, 1.0)}.d_l2_pct"]),
        ("ce_overhead_nats", "The CE overhead", 100 * (3.1 / 2.5 - 1)),
    ):
        changes = paired_changes(arms, column)
        selected = grid_id(lambda2, sigma_sq)
        if not len(changes.get(selected, ())):
            continue
        effect = over_seeds(changes)[selected]
        ends = (
            ""
            if math.isnan(effect.low)
            else (f" ({between(effect.low, effect.high, percent)} for new seeds)")
        )
        lines.append(
            f"{name} of the joint arm (λ₂ {lambda2:g}, σ² {sigma_sq:g}) differs from that of the "
            f"solo arm of its seed by {percent(effect.difference)}{ends}; the paper has "
            f"{percent(paper)}."
        )
    dead = arms.groupby("kind", sort=False).dead.agg(["min", "max"]).astype(int)
    shares = [
        f"{kind} {low:,}" + (f" to {high:,}" if high > low else "")
        for kind, low, high in dead.itertuples()
    ]
    lines.append(
        f"Dead features (never selected on the calibration text), of "
        f"{run.profile.dictionary.n_features:,}: {', '.join(shares)}."
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
    l0, l2, shown = wide["l0"], wide["l2"], wide["l0"].map(number)
    pairs = shown["JumpReLU"] + " against " + shown["BatchTopK"]
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
    other = (
        "does not exclude the paper's {} either" if low <= published else "excludes the paper's {}"
    )
    return f"so this run cannot tell a reduction from none, and {other.format(percent(published))}"


def welch_section(test: TTest, n_pairs: int, alive: int) -> Markdown:
    """Welch's t over pairs as §5.1 has it, and why it says nothing. n_pairs, alive: of a side."""
    return section(
        "Welch's t over pairs, and why not",
        f"As the paper does it, over {n_pairs:,} pairs a side: t = {number(test.t)}, "
        f"p = {number(test.p)}, but an effect of d = {number(test.d)}. "
        f"{alive:,} features make all these pairs, so they hang together and the standard error is "
        "too small; a large t would say that there are many pairs, not that the difference would "
        "come again. With the paper's own numbers the test does not add up (box 3 of the "
        "scorecard).",
    )


def structure_sentence(structure: pd.DataFrame, moved: float, changes: pd.DataFrame) -> Markdown:
    """How many pairs are above chance, and what joint training does to them and to clusters.

    structure: `measure.structure_table`, a solo arm first. moved: pairs above chance in that arm
    with one side at another place of the text. changes: `measure.paired_measures` of its columns.
    """
    first = structure.iloc[0]
    return Markdown(
        f"In {first.arm}, {first.pairs_above:,.0f} pairs ({first.above_pct:.1f}%) fire together "
        f"more than chance has it, and make {first.excess_pct:.0f}% of what mean |φ| has above its "
        f"null; with one side of each pair moved to another place of the text, {moved:,.0f} do. "
        f"Under joint training the number of such pairs {_moves(changes, 'pairs_above')}; the "
        f"number of features in clusters {_moves(changes, 'clustered')}."
    )


def probe_sentence(scores: pd.DataFrame, changes: pd.DataFrame) -> Markdown:
    """What probes on five features say of joint against solo, beside their rivals.

    scores: `measure.probe_arms`; changes: `measure.paired_measures` of the means over tasks.
    """
    k = scores[scores.kind == "solo"].k.max()
    mean = scores[scores.k.isin([k]) | (scores.kind == "dense")].groupby("kind").auc.mean()
    return Markdown(
        f"Mean AUC over {scores.task.nunique()} tasks with {k} features: {mean['solo']:.1%} solo, "
        f"{mean['joint']:.1%} joint. The best {k} of as many random directions reach "
        f"{mean['random']:.1%}, a probe on the whole residual {mean['dense']:.1%}, guessing 50%. "
        f"Under joint training it {_moves(changes, f'auc_{k}')}, in percentage points."
    )


def moves(low: float, high: float) -> str:
    """Which way a change with this interval goes, in words."""
    return "rises" if low > 0 else "falls" if high < 0 else "does not clearly move"


def with_ends(change: float, low: float, high: float, show: Callable[[float], str] = number) -> str:
    """A change with the ends of its interval, where it has one."""
    return show(change) + ("" if math.isnan(low) else f"; {between(low, high, show)}")


def _moves(changes: pd.DataFrame, measure: str) -> str:
    """What the joint arms do to a measure, against solo and at equal L2, in a clause."""
    mine = changes[(changes.measure == measure) & (changes.setting == "joint")]
    said = []
    for row in mine.to_dict("records"):
        low, high = row["low"], row["high"]
        against = "against solo" if row["against"] == "solo" else "against solo at equal L2"
        said.append(f"{moves(low, high)} {against} ({with_ends(row['change'], low, high)})")
    return " and ".join(said)


def judged_sentence(compared: pd.DataFrame, judge: str) -> Markdown:
    """What a judge's fuzzing scores say of joint against solo, and at equal L2.

    compared: `interpret.compare_all`.
    """
    mine = compared[(compared.judge == judge) & (compared.pairs == "matched")]
    names = {"solo": "the solo arm", "frontier": "the solo arm of nearest L2"}
    parts = []
    for row in mine[(mine.score == "fuzzing") & (mine.n > 0)].to_dict("records"):
        delta, low, high = row["delta"], row["low"], row["high"]
        sees = "differs from zero" if low > 0 or high < 0 else "holds zero"
        against = names.get(row["against"], row["against"])
        parts.append(
            f"against {against} **{signed(delta)}** ({between(low, high, signed)}, for new "
            f"{row['over']};"
            f" {row['n']:,} pairs of {row['n_seeds']:.0f} seeds): the interval {sees}"
        )
    if not parts:
        return Markdown("The profile's judge did not pass its controls: there is no result here.")
    said, paper = "; ".join(parts), signed(load_published()["gpt2-large.fuzz_paired_delta"])
    return Markdown(f"By the {judge} judge, joint fuzzing scores {said}. The paper has {paper}.")


def conclusion(run: Run) -> list[str]:
    """The sentences that `03_cooccurrence` ends with, from its table of effects."""
    ways = effects_by_way(run)
    published = load_published()[f"gpt2-large.table1.{grid_id(0.3, 1.0)}.d_mean_abs_phi_pct"]
    lambda2, sigma_sq = run.profile.selected
    main = ways.get("seeds") or ways["features"]
    first = (
        f"On {model_name(run)}, layer {run.profile.model.layer}, joint training (λ₂ {lambda2:g}, "
        f"σ² {sigma_sq:g}) changes mean |φ| by {percent(main['change_pct'])} against the solo "
        f"dictionary of the same seed ({between(main['low'], main['high'], percent)} for new "
        + (
            f"seeds and features, {main['n_seeds']:.0f} pairs)"
            if main["way"] == "seeds"
            else "features, one pair)"
        )
    )
    rest = [reading(main["low"], main["high"], published)]
    if "frontier" in ways:
        rest.append(at_equal_l2(ways["frontier"]))
    if reason := collapsed(run):
        rest = [f"but {reason}: such dictionaries say nothing for or against the paper"]
    return [f"{text[0].upper()}{text[1:]}." for text in (first, *rest)]


def model_name(run: Run) -> str:
    """The language model of a run, as a reader calls it."""
    kind, _, place = run.profile.model.source.partition(":")
    return literal(Path(place).name if kind == "folder" else place)


def effects_by_way(run: Run) -> dict[str, dict[str, Any]]:
    """The run's table of effects, the first row of each way to compare."""
    rows = run.load_table("effects").drop_duplicates("way").to_dict("records")
    return {row["way"]: {str(key): value for key, value in row.items()} for row in rows}


def at_equal_l2(effect: Mapping[str, Any]) -> str:
    """Whether worse reconstruction alone explains the change of mean |φ|, in a clause.

    effect: change_pct, low, high of the joint arm against the solo frontier.
    """
    size = f"{percent(effect['change_pct'])} ({between(effect['low'], effect['high'], percent)})"
    against = "against solo dictionaries that reconstruct as badly (smaller k, equal L2)"
    if math.isnan(effect["low"]):
        return f"{against} it is {percent(effect['change_pct'])}, from one seed"
    if effect["high"] < 0:
        return f"{against} it is still {size}: worse reconstruction alone does not explain it"
    if effect["low"] > 0:
        return (
            f"{against} it is {size}: making a solo dictionary as bad by a smaller k lowers "
            f"mean |φ| more"
        )
    return f"{against} it is {size}: this run cannot tell the penalty from worse reconstruction"


def answer(run: Run) -> str:
    """A run's answer in a clause: does mean |φ| fall, and does worse reconstruction explain it."""
    ways = effects_by_way(run)
    name = literal(run.name)
    if reason := collapsed(run):
        return f"in {name} nothing can be said: {reason}"
    main = ways.get("seeds") or ways["features"]
    low, high = main["low"], main["high"]
    size = f"{percent(main['change_pct'])}, {between(low, high, percent)}"
    said = f"in {name} mean |φ| {moves(low, high)} under joint training ({size})"
    if "frontier" not in ways:
        has_curve = "frontier" in run.profile.training.arms
        return said + ", with nothing to compare with at equal L2" * has_curve
    curve, rivals = ways["frontier"], "solo dictionaries of smaller k that reconstruct as badly"
    low, high = curve["low"], curve["high"]
    size = f"{percent(curve['change_pct'])}, {between(low, high, percent)}"
    if high < 0:
        return f"{said}, also against {rivals} ({size})"
    if low > 0:
        return f"{said}, but {rivals} have still less ({size})"
    return f"{said}, and cannot be told from {rivals} ({size})"


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
        selected = grid_id(*run.profile.selected)
        l2, ce = (
            paired_changes(arms, column).get(selected, pd.Series())
            for column in ("l2", "ce_overhead_nats")
        )
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


def recovery_rank(scores: pd.DataFrame) -> float:
    """Rank correlation of mean |φ| and the share of atoms recovered, over all dictionaries."""
    return scores.mean_abs_phi.corr(scores.recovered, method="spearman")


def ground_truth_sentences(scores: pd.DataFrame) -> list[str]:
    """Whether joint training recovers more atoms, and whether mean |φ| tells, as sentences.

    Columns of `scores`: lambda2 (0: solo), recovered, mean_abs_phi; a row a dictionary.
    """
    means = scores.groupby("lambda2")[["recovered", "mean_abs_phi"]].mean()
    solo, joint = means.loc[0.0], means.drop(0.0)
    best, most = joint.index[int(joint.recovered.argmax())], joint.recovered.max()
    gain = most - solo.recovered
    scatter = scores[scores.lambda2 == 0].recovered.std()
    clear = "more" if gain > 2 * scatter else "fewer"
    verdict = clear if abs(gain) > 2 * scatter else "no clear difference"
    rank = signed(recovery_rank(scores), "+.2f")
    misled = joint[(joint.mean_abs_phi < solo.mean_abs_phi) & (joint.recovered < solo.recovered)]
    return [
        f"At its best setting here (λ₂ = {best:g}) joint training recovers "
        f"{most:.0%} of the atoms, solo training {solo.recovered:.0%}. Held "
        f"against twice the scatter of the solo seeds ({200 * scatter:.0f} percentage points), "
        f"that is {verdict}.",
        f"At λ₂ = {joint.index[-1]:g}, the largest here, it recovers "
        f"{joint.recovered.iloc[-1]:.0%}.",
        "A setting with lower mean |φ| than solo *and* fewer atoms recovered: "
        + (", ".join(misled.index.map("λ₂ = {:g}".format)) or "none") + ".",
        "Over all dictionaries, mean |φ| and recovery have a rank correlation of "
        f"{rank}: −1 would be the paper's reading, the lower mean |φ| the more atomic, "
        "and 0 no relation.",
    ]  # fmt: skip
