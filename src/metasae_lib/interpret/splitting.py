"""Features of one dictionary that come apart in another, and those that come together.

A feature of dictionary A *splits* in B when it fires together with several features of B that do
not fire together themselves; a *merge* is the same thing seen from B. Two dictionaries of the same
kind split and merge each other too, so counts are read against that null and against each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from metasae_lib.interpret.senses import quoted
from metasae_lib.measure import Counts, CrossCounts, phi, top_matches
from metasae_lib.study import COMPETITORS, MeasureError
from metasae_lib.train import Arm

_LOOK = 8  # partners looked at for each feature, strongest first
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Rule:
    """What makes a feature a splitting candidate; every clause of NOTES §1 and two of ours.

    max_rate: firing rate per token at most (as released: 0.05). min_characters: of the token on
    which the feature peaks, blanks aside, which must hold a letter or digit (as released: 2).
    n_partners: the candidate's rank is the φ with its n-th strongest partner (as released: 2).
    min_phi: that φ must reach this, or it is no candidate (as released: none, all were ranked).
    max_partner_phi: two partners may fire together up to this φ, or they count as one (as
    released: none). min_count: tokens on which a feature must fire, for φ to mean something.
    """

    max_rate: float = 0.05
    min_characters: int = 2
    n_partners: int = 2
    min_phi: float = 0.3
    max_partner_phi: float = 0.5
    min_count: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.n_partners <= _LOOK:
            raise MeasureError(f"n_partners is {self.n_partners}: choose 1 to {_LOOK}")


@dataclass(frozen=True)
class Side:
    """One dictionary: its own counts on the scanned tokens, and the token on which each of its n
    features is strongest."""

    counts: Counts
    peaks: Sequence[str]


def eligible(side: Side, rule: Rule) -> NDArray[np.bool_]:
    """Which features the rule looks at (max_rate, min_count, min_characters). Returns (n,)."""
    words = [
        len(t.strip()) >= rule.min_characters and any(c.isalnum() for c in t) for t in side.peaks
    ]
    n1 = side.counts.n1
    rare = (n1 >= max(rule.min_count, 1)) & (n1 <= rule.max_rate * side.counts.n_tokens)
    return np.array(words, bool) & rare


def find(
    cross: CrossCounts, a: Side, b: Side, rule: Rule | None = None, top: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Features of A that split in B, strongest first: one row a (feature, partner).

    cross: counts between A and B. For merges give `reverse(cross)` and the sides swapped. top: the
    `strongest` of these counts, where several rules are asked about. Columns:
    rank (from 1), feature, score (φ with the n-th partner), rate, peak, partner, phi, partner_rate,
    partner_peak, overlap (largest φ of this partner with a stronger one; nan for the first).
    MeasureError if the counts are of other dictionaries.
    """
    rule = rule or Rule()
    if cross.n11.shape != (len(a.counts.n1), len(b.counts.n1)):
        raise MeasureError(
            f"the cross counts are {cross.n11.shape} for {len(a.counts.n1)} and "
            f"{len(b.counts.n1)} features: give the counts of these two dictionaries"
        )
    top = strongest(cross) if top is None else top
    able_a, able_b = eligible(a, rule), b.counts.n1 >= rule.min_count
    top = top[(top.phi >= rule.min_phi) & able_a[top.feature] & able_b[top.match]]
    top = top[top.groupby("feature").match.transform("size") >= rule.n_partners]
    rows = []
    for feature, group in top.groupby("feature"):
        kept = _apart(group, b.counts, rule.max_partner_phi)
        if len(kept) >= rule.n_partners:
            score = kept[rule.n_partners - 1][1]
            rows += [(feature, score, *partner) for partner in kept]
    found = pd.DataFrame(rows, columns=["feature", "score", "partner", "phi", "overlap"])
    found = found.astype({"feature": int, "partner": int}).sort_values(
        ["score", "feature", "phi"], ascending=[False, True, False], kind="stable"
    )
    found["rank"] = pd.factorize(found.feature)[0] + 1
    for side, column, prefix in ((a, "feature", ""), (b, "partner", "partner_")):
        found[f"{prefix}rate"] = side.counts.rates[found[column]]
        found[f"{prefix}peak"] = [side.peaks[i] for i in found[column]]
    columns = ["rank", "feature", "score", "rate", "peak"]
    columns += ["partner", "phi", "partner_rate", "partner_peak", "overlap"]
    return found[columns].reset_index(drop=True)


def listed(candidates: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """The first `count` candidates for reading: a row for the solo feature, then its partners.

    candidates: of `find`, with columns cosine and, for the feature and `partner_...`, explanation
    and fuzz. Columns: rank, sae, feature, peak, rate, phi, cosine, overlap, fuzz, explanation; what
    comes from the text is quoted, so that nothing in it is read as Markdown or HTML.
    """
    first = candidates[candidates["rank"] <= count]
    about = ["feature", "peak", "rate", "fuzz", "explanation"]
    theirs = dict(zip(["partner", *(f"partner_{c}" for c in about[1:])], about, strict=True))
    solo = first.drop_duplicates("feature")[["rank", *about]].assign(sae="solo")
    joint = first[["rank", *theirs, "phi", "cosine", "overlap"]].rename(columns=theirs)
    both = pd.concat([solo, joint.assign(sae="joint")]).sort_values("rank", kind="stable")
    for column in ("peak", "explanation"):
        both[column] = both[column].map(quoted, na_action="ignore")
    columns = ["rank", "sae", *about[:3], "phi", "cosine", "overlap", *about[3:]]
    return both[columns].reset_index(drop=True)


def strongest(cross: CrossCounts) -> pd.DataFrame:
    """The partners in B of every feature of A that any rule looks at, whatever its clauses."""
    return top_matches(cross, _LOOK)


def reverse(cross: CrossCounts) -> CrossCounts:
    """The same counts seen from the other dictionary."""
    return CrossCounts(cross.n11.T, cross.n1_b, cross.n1_a, cross.n_tokens)


def count_directions(
    cross: CrossCounts, a: Side, b: Side, rules: Sequence[Rule] = (Rule(),)
) -> list[dict[str, int]]:
    """How many features of A split in B (splits), and of B in A (merges), of how many eligible.

    One answer for each rule. Keys: splits, merges, eligible_a, eligible_b.
    """
    back = reverse(cross)
    here, there = strongest(cross), strongest(back)  # most of the time, and the same for all rules
    return [
        {
            "splits": int(find(cross, a, b, rule, here).feature.nunique()),
            "merges": int(find(back, b, a, rule, there).feature.nunique()),
            "eligible_a": int(eligible(a, rule).sum()),
            "eligible_b": int(eligible(b, rule).sum()),
        }
        for rule in rules
    ]


def _compared(arm: Arm, selected: tuple[float, float]) -> bool:
    """Whether an arm is a solo arm, a joint arm at `selected` (λ₂, σ²), or a competitor."""
    spec = arm.spec
    at = (spec.kind, spec.lambda2, spec.sigma_sq)
    return spec.kind in ("solo", *COMPETITORS) or at == ("joint", *selected)


def two_seeds(arms: Mapping[str, Arm], selected: tuple[float, float]) -> dict[str, Arm]:
    """Solo, joint at `selected` (λ₂, σ²) and competing arms, of the first two seeds alone."""
    seeds = list(dict.fromkeys(a.spec.seed for a in arms.values() if a.spec.kind == "solo"))[:2]
    return {n: a for n, a in arms.items() if a.spec.seed in seeds and _compared(a, selected)}


def seed_pairs(arms: Mapping[str, Arm], selected: tuple[float, float]) -> pd.DataFrame:
    """Which dictionaries to hold against each other: columns role, a, b (names of arms).

    role: `joint` solo against joint of the next seed; `same start` solo against joint of the same
    seed, which began with the same weights, the only one where there is one seed; `null` solo
    against solo of the next seed; a competitor's kind, solo against it of the next seed.
    selected: λ₂ and σ² of the joint arms.
    """
    used = {(a.spec.kind, a.spec.seed): n for n, a in arms.items() if _compared(a, selected)}
    solo, joint = ({s: n for (k, s), n in used.items() if k == kind} for kind in ("solo", "joint"))
    seeds = sorted(solo.keys() & joint.keys())
    pairs = []
    for here, after in zip(seeds, [*seeds[1:], *seeds[:1]], strict=True):
        if here != after:
            pairs.append(("joint", solo[here], joint[after]))
            rivals = (kind for kind in COMPETITORS if (kind, after) in used)
            pairs += [(kind, solo[here], used[kind, after]) for kind in rivals]
        pairs.append(("same start", solo[here], joint[here]))
        if len(seeds) > 2 or here < after:  # of two seeds there is one pair
            pairs.append(("null", solo[here], solo[after]))
    return pd.DataFrame(pairs, columns=["role", "a", "b"])


def _apart(group: pd.DataFrame, counts: Counts, max_phi: float) -> list[tuple[int, float, float]]:
    """(partner, φ, overlap) of the partners that do not fire together with a stronger one."""
    kept: list[tuple[int, float, float]] = []
    for partner, value in zip(group.match, group.phi, strict=True):
        stronger, n1, overlap = [p for p, _, _ in kept], counts.n1, np.nan
        if kept:
            together = np.asarray(counts.n11[partner])[None, stronger]
            overlap = phi(together, n1[[partner]], n1[stronger], counts.n_tokens).max().item()
        if not kept or overlap <= max_phi:
            kept.append((partner, value, overlap))
    return kept


@dataclass(frozen=True)
class Pooled:
    """Splits and merges of solo against joint, pooled over pairs, beside solo against solo.

    p_direction: two-sided binomial test of splits against merges. p_null: Fisher's exact test of
    the share of solo features that split, joint against another solo. Both take features as
    independent, which they are not: they can only rule out an effect, not prove one.
    """

    splits: int
    merges: int
    split_share: float
    null_share: float
    p_direction: float
    p_null: float

    @property
    def supported(self) -> bool:
        """More splits than merges, and more than another solo dictionary gives."""
        return (
            self.splits > self.merges
            and self.p_direction < SIGNIFICANCE
            and self.split_share > self.null_share
            and self.p_null < SIGNIFICANCE
        )

    def sentence(self) -> str:
        """The finding in words, drawn from the numbers alone."""
        if math.isnan(self.null_share):
            return (
                "This run has one seed; splits are held against what two solo dictionaries do to "
                "each other, which takes two of training.seeds."
            )
        counts = (
            f"{self.splits:,} solo features split in a joint dictionary and {self.merges:,} joint "
            f"features split in a solo one"
        )
        shares = (
            f"{self.split_share:.1%} of the eligible solo features split in a joint dictionary, "
            f"{self.null_share:.1%} in another solo one"
        )
        if self.splits + self.merges == 0:
            return "No feature splits in either direction, so this run has nothing to show."
        if self.supported:
            return f"Joint training splits more than it merges ({counts}), and {shares}."
        if self.p_direction < SIGNIFICANCE and self.splits < self.merges:
            return f"It is merging that prevails: {counts}; {shares}."
        if self.p_direction < SIGNIFICANCE:
            return (
                f"Splits outnumber merges ({counts}), but a second solo dictionary splits them as "
                f"well: {shares}."
            )
        return f"Splits do not outnumber merges: {counts}; {shares}."


def pool(pairs: pd.DataFrame) -> Pooled:
    """Pool the counts of :func:`count_directions` over the pairs of dictionaries.

    pairs: one row a pair, with columns role ("joint": solo against joint of another seed; "null":
    solo against solo), splits, merges, eligible_a, eligible_b. Rows of other roles are left out: a
    pair that started from the same weights has no solo pair to be held against. In a null pair
    neither direction is special, so both count. The shares are NaN without such pairs: of one seed.
    """
    total = pairs.groupby("role").sum(numeric_only=True).to_dict("index")
    if not {"joint", "null"} <= total.keys():
        return Pooled(0, 0, math.nan, math.nan, 1.0, 1.0)
    joint, null = total["joint"], total["null"]
    splits, merges, able = joint["splits"], joint["merges"], joint["eligible_a"]
    null_splits, null_able = (
        null["splits"] + null["merges"],
        null["eligible_a"] + null["eligible_b"],
    )
    table = np.array([[splits, able - splits], [null_splits, null_able - null_splits]])
    return Pooled(
        splits=splits,
        merges=merges,
        split_share=splits / max(able, 1),
        null_share=null_splits / max(null_able, 1),
        p_direction=stats.binomtest(splits, splits + merges).pvalue if splits + merges else 1.0,
        p_null=float(stats.fisher_exact(table)[1]),
    )


def least_overlap(phi_a: float, phi_b: float) -> float:
    """The smallest φ that two features can have with each other, given their φ with a third.

    A correlation matrix has no negative eigenvalue, so
    φ_ab ≥ φ_a φ_b - √((1 - φ_a²)(1 - φ_b²)). Above 0, the two must fire together more often than
    by chance: they cannot be two senses that exclude each other.
    """
    if not (-1 <= phi_a <= 1 and -1 <= phi_b <= 1):
        raise MeasureError(f"{phi_a} and {phi_b} are not two φ: each lies between -1 and 1")
    return phi_a * phi_b - float(np.sqrt((1 - phi_a**2) * (1 - phi_b**2)))
