"""Joint against solo by a judge: matched pairs, their scores, their differences (§5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.material import Plan
from metasae_lib.interpret.scores import SCORES
from metasae_lib.measure.matching import hungarian
from metasae_lib.measure.statistics import needed, paired_t, share_higher

if TYPE_CHECKING:
    from metasae_lib.train.training import Arm


def matched_pairs(solo: Arm, joint: Arm) -> pd.DataFrame:
    """Hungarian matching of two arms on decoder cosine. Columns: solo, joint, cosine."""
    rows, columns, cosines = hungarian(solo.sae.W_dec, joint.sae.W_dec)
    return pd.DataFrame({"solo": rows, "joint": columns, "cosine": cosines})


def choose_pairs(
    pairs: pd.DataFrame, solo: Contexts, joint: Contexts, plan: Plan, count: int, cosine: float
) -> pd.DataFrame:
    """Up to `count` of the pairs at a cosine or more whose features both have enough examples.

    A random sample by `plan.seed`, in ascending order of the solo feature; a larger count has the
    smaller one's pairs among its own.
    """
    can = {
        name: contexts.usable(plan.examples, plan.examples)
        for name, contexts in (("solo", solo), ("joint", joint))
    }
    kept = pairs[
        (pairs.cosine >= cosine) & pairs.solo.isin(can["solo"]) & pairs.joint.isin(can["joint"])
    ]
    order = np.random.default_rng(plan.seed).permutation(len(pairs))
    rank = pd.Series(order, index=pairs.index)[kept.index]
    return kept.loc[rank.sort_values().index[:count]].sort_values("solo").reset_index(drop=True)


def compare(
    pairs: pd.DataFrame, solo: pd.DataFrame, joint: pd.DataFrame, score_name: str, resamples: int
) -> dict[str, float]:
    """Joint minus solo over pairs of features (§5.2). solo, joint: frames of `score`.

    pairs: columns solo and joint. Pairs of which either has no score are left out and counted.
    Returns n, lost, solo and joint means, delta with its bootstrap interval (low, high), t, p, d,
    share higher (ties left out) with its interval, ties, the change in percent, and the pairs
    needed to see the paper's effect size at this many, with a power of 80%. nan where the
    differences do not vary.
    """
    a = pairs.solo.map(solo.set_index("feature")[score_name]).to_numpy(float)
    b = pairs.joint.map(joint.set_index("feature")[score_name]).to_numpy(float)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    nothing = float("nan")
    result: dict[str, float] = {"n": int(both.sum()), "lost": int((~both).sum())}
    if not len(a):
        return result
    low, high = bootstrap_mean(b - a, resamples)
    result |= {
        "solo": float(a.mean()), "joint": float(b.mean()), "delta": float((b - a).mean()),
        "low": low, "high": high, "ties": int((a == b).sum()),
        "percent": 100 * float((b - a).mean() / a.mean()) if a.mean() > 0 else nothing,
    }  # fmt: skip
    if len(a) < 2 or np.ptp(b - a) == 0:
        return result | dict.fromkeys(
            ("t", "p", "d", "higher", "higher_low", "higher_high"), nothing
        )
    test = paired_t(b - a)
    higher = share_higher(b - a)
    return result | {
        "t": test.t, "p": test.p, "d": test.d,
        "higher": higher[0], "higher_low": higher[1], "higher_high": higher[2],
        "spread": float(np.std(b - a, ddof=1)),
    }  # fmt: skip


def pairs_needed(spread: float, delta: float = 0.0175, power: float = 0.8) -> int:
    """Pairs that show a mean difference `delta` (the paper's by default) that often.

    spread: standard deviation of the differences of pairs.
    """
    return needed(delta / spread, power)


def bootstrap_mean(
    values: ArrayLike, resamples: int, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over resamples of the values (n,)."""
    x = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    means: NDArray[np.float64] = np.array(
        [x[generator.integers(len(x), size=len(x))].mean() for _ in range(max(resamples, 1000))]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def kept_pairs(pairs: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """How many matched pairs several cosine thresholds keep. Columns: cosine, pairs, share."""
    kept = [int((pairs.cosine >= threshold).sum()) for threshold in thresholds]
    return pd.DataFrame(
        {"cosine": thresholds, "pairs": kept, "share": [k / len(pairs) for k in kept]}
    )


def compare_all(
    asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame, resamples: int
) -> pd.DataFrame:
    """`compare` for every judge and score, over its matched pairs and over the same features
    paired at random.

    asked: pairs by judge. scores: frames of `score` with the columns judge and kind (solo, joint).
    Columns: judge, pairs (`matched`, `random`), score, and those of `compare`.
    """
    rows = []
    for judge, pairs in asked.items():
        mine = scores[scores.judge == judge]
        solo, joint = (mine[mine.kind == kind] for kind in ("solo", "joint"))
        random = pairs.assign(joint=pairs.joint.sample(frac=1, random_state=0).to_numpy())
        for which, chosen in (("matched", pairs), ("random", random)):
            for name in SCORES:
                found = compare(chosen, solo, joint, name, resamples)
                rows.append({"judge": judge, "pairs": which, "score": name} | found)
    return pd.DataFrame(rows)


def figure_2(asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame) -> pd.DataFrame:
    """`density_difference` of fuzzing scores over each judge's pairs, with a column judge."""
    frames = []
    for judge, pairs in asked.items():
        mine = scores[scores.judge == judge].set_index("feature")
        both = pd.DataFrame(
            {kind: pairs[kind].map(mine[mine.kind == kind].fuzzing) for kind in ("solo", "joint")}
        ).dropna()
        if len(both):
            frames.append(density_difference(both.solo, both.joint).assign(judge=judge))
    columns = ["score", "difference", "low", "high", "judge"]
    return pd.concat(frames) if frames else pd.DataFrame(columns=columns)


def density_difference(
    solo: ArrayLike, joint: ArrayLike, bins: int = 20, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Figure 2: density of the joint scores minus that of the solo ones, on [-1, 1].

    solo, joint: (n,) scores of matched pairs. Columns: score (bin centre), difference (per unit of
    score), low and high (95%, pairs resampled).
    """
    a, b = np.asarray(solo, np.float64), np.asarray(joint, np.float64)
    edges = np.linspace(-1, 1, bins + 1)
    places = [np.clip(np.digitize(x, edges) - 1, 0, bins - 1) for x in (a, b)]
    change = np.zeros((len(a), bins))
    change[np.arange(len(a)), places[1]] += 1
    change[np.arange(len(a)), places[0]] -= 1
    change /= edges[1] - edges[0]
    generator = np.random.default_rng(seed)
    draws = [change[generator.integers(len(a), size=len(a))].mean(axis=0) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "score": (edges[:-1] + edges[1:]) / 2, "difference": change.mean(axis=0),
            "low": low, "high": high,
        }
    )  # fmt: skip


def published_values(found: dict[str, float], matched: int) -> pd.DataFrame:
    """A fuzzing comparison (`compare`) under the ids of the paper's values (§5.2, §4, §6).

    Columns: id, value, low, high, words.
    """
    nothing = float("nan")
    solo = found.get("solo", nothing)
    percent = [100 * found.get(name, nothing) / solo for name in ("delta", "low", "high")]
    change = tuple(percent) if solo > 0 else (nothing,) * 3
    share = [100 * found.get(name, nothing) for name in ("higher", "higher_low", "higher_high")]
    gpt2 = {
        "fuzz_joint_mean": (found.get("joint", nothing), nothing, nothing),
        "fuzz_solo_mean": (solo, nothing, nothing),
        "fuzz_paired_delta": tuple(found.get(name, nothing) for name in ("delta", "low", "high")),
        "fuzz_delta_pct": change,
        "fuzz_paired_t": (found.get("t", nothing), nothing, nothing),
        "fuzz_paired_p": (found.get("p", nothing), nothing, nothing),
        "fuzz_joint_higher_pct": tuple(share),
        "matched_pairs": (float(matched), nothing, nothing),
    }
    rows = {f"gpt2-large.{name}": row for name, row in gpt2.items()}
    rows["gemma-2-9b.fuzz_delta_pct_selected"] = change
    return pd.DataFrame(
        [
            {"id": name, "value": value, "low": low, "high": high, "words": ""}
            for name, (value, low, high) in rows.items()
        ]
    )
