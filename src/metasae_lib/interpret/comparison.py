"""Joint against solo by a judge: matched pairs, their scores, their differences (§5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.material import Sampling
from metasae_lib.interpret.scores import SCORES
from metasae_lib.measure import hungarian
from metasae_lib.measure.statistics import needed, paired_t, share_higher
from metasae_lib.train import Arm


def matched_pairs(solo: Arm, joint: Arm) -> pd.DataFrame:
    """Hungarian matching of two arms on decoder cosine. Columns: solo, joint, cosine."""
    rows, columns, cosines = hungarian(solo.sae.directions, joint.sae.directions)
    return pd.DataFrame({"solo": rows, "joint": columns, "cosine": cosines})


def choose_pairs(
    pairs: pd.DataFrame,
    solo: Contexts,
    joint: Contexts,
    sampling: Sampling,
    count: int,
    cosine: float,
) -> pd.DataFrame:
    """Up to `count` of the pairs at a cosine or more whose features both have enough examples.

    A random sample by `sampling.seed`, in ascending order of the solo feature; a larger count has
    the smaller one's pairs among its own.
    """
    size = sampling.examples
    kept = pairs[
        (pairs.cosine >= cosine)
        & pairs.solo.isin(solo.usable(size, size))
        & pairs.joint.isin(joint.usable(size, size))
    ]
    order = np.random.default_rng(sampling.seed).permutation(len(pairs))
    rank = pd.Series(order, index=pairs.index)[kept.index]
    return kept.loc[rank.sort_values().index[:count]].sort_values("solo").reset_index(drop=True)


def _of_pairs(pairs: pd.DataFrame, scores: pd.DataFrame, score_name: str) -> pd.DataFrame:
    """One score of both features of each pair, columns solo and joint. scores: as in `compare`."""
    of = {kind: scores[scores.kind == kind].set_index("feature") for kind in ("solo", "joint")}
    return pd.DataFrame({kind: pairs[kind].map(mine[score_name]) for kind, mine in of.items()})


def compare(
    pairs: pd.DataFrame, scores: pd.DataFrame, score_name: str, resamples: int
) -> dict[str, float]:
    """Joint minus solo over pairs of features (§5.2).

    pairs: columns solo and joint. scores: frames of `score` with the column kind (solo, joint).
    Pairs of which either has no score are left out and counted.
    Returns n, lost, solo and joint means, delta with its bootstrap interval (low, high), t, p, d,
    share higher (ties left out) with its interval, ties, the change in percent, and the pairs
    needed to see the paper's effect size at this many, with a power of 80%. nan where the
    differences do not vary.
    """
    both = _of_pairs(pairs, scores, score_name)
    a, b = both.dropna().to_numpy(float).T
    result: dict[str, float] = {"n": len(a), "lost": len(both) - len(a)}
    if not len(a):
        return result
    change = b - a
    means = _resampled_means(change, max(resamples, 1000))
    low, high = np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    result |= {
        "solo": float(a.mean()), "joint": float(b.mean()), "delta": float(change.mean()),
        "low": float(low), "high": float(high), "ties": int((a == b).sum()),
        "percent": 100 * float(change.mean() / a.mean()) if a.mean() > 0 else np.nan,
    }  # fmt: skip
    tests = "t", "p", "d", "higher", "higher_low", "higher_high"
    if len(a) < 2 or np.ptp(change) == 0:
        return result | dict.fromkeys(tests, np.nan)
    test = paired_t(change)
    found = (test.t, test.p, test.d, *share_higher(change))
    spread = {"spread": float(np.std(change, ddof=1))}
    return result | dict(zip(tests, found, strict=True)) | spread


def pairs_needed(spread: float, delta: float = 0.0175, power: float = 0.8) -> int:
    """Pairs that show a mean difference `delta` (the paper's by default) that often.

    spread: standard deviation of the differences of pairs.
    """
    return needed(delta / spread, power)


def _resampled_means(values: NDArray[np.float64], resamples: int) -> list[NDArray[np.float64]]:
    """Means over the rows (n, ...), each over n drawn again."""
    generator, n = np.random.default_rng(0), len(values)
    return [values[generator.integers(n, size=n)].mean(axis=0) for _ in range(resamples)]


def kept_pairs(arms: Mapping[str, Arm], joint: Arm, thresholds: Sequence[float]) -> pd.DataFrame:
    """Share of a joint arm's matched pairs that several cosine thresholds keep, by solo seed.

    Columns: with (the solo arm, and whether it started from the same weights), and one a threshold.
    """
    rows = []
    for name, arm in arms.items():
        if arm.spec.kind == "solo":
            cosine = matched_pairs(arm, joint).cosine
            start = "same" if arm.spec.seed == joint.spec.seed else "another"
            rows.append([f"{name}, {start} start", *((cosine >= t).mean() for t in thresholds)])
    return pd.DataFrame(rows, columns=["with", *(f"cosine ≥ {t:g}" for t in thresholds)])


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
        random = pairs.assign(joint=pairs.joint.sample(frac=1, random_state=0).to_numpy())
        for which, chosen in (("matched", pairs), ("random", random)):
            for name in SCORES:
                found = compare(chosen, mine, name, resamples)
                rows.append({"judge": judge, "pairs": which, "score": name} | found)
    return pd.DataFrame(rows)


def figure_2(asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame) -> pd.DataFrame:
    """`density_difference` of fuzzing scores over each judge's pairs, with a column judge."""
    frames = []
    for judge, pairs in asked.items():
        both = _of_pairs(pairs, scores[scores.judge == judge], "fuzzing").dropna()
        if len(both):
            frames.append(density_difference(both.solo, both.joint).assign(judge=judge))
    columns = ["score", "difference", "low", "high", "judge"]
    return pd.concat(frames) if frames else pd.DataFrame(columns=columns)


def density_difference(
    solo: ArrayLike, joint: ArrayLike, bins: int = 20, resamples: int = 1000
) -> pd.DataFrame:
    """Figure 2: density of the joint scores minus that of the solo ones, on [-1, 1].

    solo, joint: (n,) scores of matched pairs. Columns: score (bin centre), difference (per unit of
    score), low and high (95%, pairs resampled).
    """
    edges = np.linspace(-1, 1, bins + 1)
    change = np.zeros((np.size(solo), bins))
    for sign, values in ((1, np.asarray(joint)), (-1, np.asarray(solo))):
        places = np.clip(np.digitize(values, edges) - 1, 0, bins - 1)
        change[np.arange(len(places)), places] += sign
    change /= edges[1] - edges[0]
    low, high = np.quantile(_resampled_means(change, resamples), [0.025, 0.975], axis=0)
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

    def values(*names: str) -> list[float]:
        return [found.get(name, np.nan) for name in names]

    (solo,), delta, alone = values("solo"), values("delta", "low", "high"), [np.nan, np.nan]
    change = [100 * value / solo if solo > 0 else np.nan for value in delta]
    share = [100 * value for value in values("higher", "higher_low", "higher_high")]
    rows = {
        "gpt2-large.fuzz_joint_mean": [*values("joint"), *alone],
        "gpt2-large.fuzz_solo_mean": [solo, *alone],
        "gpt2-large.fuzz_paired_delta": delta,
        "gpt2-large.fuzz_delta_pct": change,
        "gpt2-large.fuzz_paired_t": [*values("t"), *alone],
        "gpt2-large.fuzz_paired_p": [*values("p"), *alone],
        "gpt2-large.fuzz_joint_higher_pct": share,
        "gpt2-large.matched_pairs": [matched, *alone],
        "gemma-2-9b.fuzz_delta_pct_selected": change,
    }
    frame = pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high"])
    return frame.rename_axis("id").reset_index().assign(words="")
