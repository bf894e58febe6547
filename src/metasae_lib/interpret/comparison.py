"""Joint against solo by a judge: matched pairs, their scores, their differences (§5.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.interpret.material import Sampling
from metasae_lib.interpret.scores import SCORES
from metasae_lib.measure import hungarian
from metasae_lib.measure.pairs import is_selected
from metasae_lib.measure.statistics import (
    Effect,
    needed,
    paired_difference,
    paired_t,
    share_higher,
)
from metasae_lib.study import Run
from metasae_lib.train import Arm


def matched_pairs(base: Arm, joint: Arm) -> pd.DataFrame:
    """Hungarian matching of two arms on decoder cosine. Columns: base, joint, cosine."""
    rows, columns, cosines = hungarian(base.sae.directions, joint.sae.directions)
    return pd.DataFrame({"base": rows, "joint": columns, "cosine": cosines})


def rivals(run: Run, fidelity: pd.DataFrame) -> pd.DataFrame:
    """The selected joint arm of every seed, and what it is held against.

    fidelity: columns arm, kind, seed, lambda2, sigma_sq, k, l2. Columns: against (`solo`;
    `frontier`: the solo arm at the smaller k whose mean L2 is nearest to that of the joint arms; or
    the name of a given dictionary), seed, base_arm, joint_arm. A seed whose arms were not all
    trained is left out.
    """
    joint = fidelity[is_selected(run, fidelity)]
    frontier = fidelity[fidelity.kind == "frontier"]
    away = (frontier.groupby("k").l2.mean() - joint.l2.mean()).abs()
    equal = frontier[frontier.k == away.idxmin()] if len(away) else frontier
    solo = fidelity[fidelity.kind == "solo"]
    given = fidelity[fidelity.kind.isin(list(run.profile.training.given))]
    against = {"solo": solo, "frontier": equal} | dict(tuple(given.groupby("kind")))
    both = pd.concat([frame.assign(against=name) for name, frame in against.items()])
    found = both.merge(joint[["arm", "seed"]], on="seed", suffixes=("", "_joint"))
    found = found.rename(columns={"arm": "base_arm", "arm_joint": "joint_arm"})
    return found[["against", "seed", "base_arm", "joint_arm"]]


def choose_pairs(
    arms: Mapping[str, Arm],
    contexts: Mapping[str, Contexts],
    compared: pd.DataFrame,
    sampling: Sampling,
    count: int,
    cosine: float,
) -> pd.DataFrame:
    """Of every two arms up to `count` matched pairs, of at least a cosine, with enough examples.

    compared: as of `rivals`; the result has its columns and base, joint (features) and
    cosine. A random sample by `sampling.seed`, in ascending order of the base's feature; a larger
    count has the smaller one's pairs among its own.
    """
    size, chosen = sampling.examples, []
    for row in compared.to_dict("records"):
        base, joint = row["base_arm"], row["joint_arm"]
        pairs = matched_pairs(arms[base], arms[joint])
        kept = pairs[
            (pairs.cosine >= cosine)
            & pairs.base.isin(contexts[base].usable(size, size))
            & pairs.joint.isin(contexts[joint].usable(size, size))
        ]
        order = np.random.default_rng(sampling.seed).permutation(len(pairs))
        rank = pd.Series(order, index=pairs.index)[kept.index]
        mine = kept.loc[rank.sort_values().index[:count]].sort_values("base")
        chosen.append(mine.assign(**{str(key): value for key, value in row.items()}))
    return pd.concat(chosen, ignore_index=True)


def _of_pairs(pairs: pd.DataFrame, scores: pd.DataFrame, score_name: str) -> pd.DataFrame:
    """One score of both features of each pair: seed, base and joint. scores: as in `compare`."""
    of = scores.set_index(["arm", "feature"])[score_name]
    found = {
        side: of.reindex(pd.MultiIndex.from_frame(pairs[[f"{side}_arm", side]])).to_numpy()
        for side in ("base", "joint")
    }
    return pd.DataFrame(found).assign(seed=pairs.seed.to_numpy())


def compare(
    pairs: pd.DataFrame, scores: pd.DataFrame, score_name: str, resamples: int
) -> dict[str, Any]:
    """Joint minus base over pairs of features (§5.2), of all seeds.

    pairs: as of `choose_pairs`. scores: frames of `score` with the column arm. Pairs of which
    either has no score are left out and counted.
    Returns n, lost, base and joint means, delta with its interval (low, high) and what that is
    `over` (new seeds and features, where there are several seeds: a t interval of the seeds' means;
    features alone with one: a bootstrap), n_seeds, scatter (deviation of one seed's mean), and over
    all pairs as the paper has it: t, p, d, share higher (ties left out) with its interval, ties,
    the change in percent, and the spread of the differences. nan where the differences do not vary.
    """
    both = _of_pairs(pairs, scores, score_name)
    kept = both.dropna()
    a, b = kept.base.to_numpy(float), kept.joint.to_numpy(float)
    result: dict[str, Any] = {"n": len(a), "lost": len(both) - len(a)}
    if not len(a):
        return result
    change = b - a
    by_seed = pd.Series(change).groupby(kept.seed.to_numpy()).mean()
    if len(by_seed) > 1:
        effect, over = paired_difference(by_seed), "seeds and features"
    else:
        means = _resampled_means(change, max(resamples, 1000))
        ends = np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
        effect, over = Effect(float(change.mean()), *ends.tolist()), "features"
    result |= {
        "base": float(a.mean()), "joint": float(b.mean()), "delta": effect.difference,
        "low": effect.low, "high": effect.high, "over": over, "n_seeds": len(by_seed),
        "scatter": effect.scatter,
        "ties": int((a == b).sum()),
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
    """`compare` for every judge and score and what joint is held against, over its matched pairs
    and over the same features paired at random within their arms.

    asked: pairs by judge. scores: frames of `score` with the columns judge and arm.
    Columns: judge, against, pairs (`matched`, `random`), score, and those of `compare`.
    """
    rows = []
    for judge, every in asked.items():
        mine = scores[scores.judge == judge]
        for against, pairs in every.groupby("against", sort=False):
            mixed = pairs.groupby("seed").joint.transform(
                lambda joint: joint.sample(frac=1, random_state=0).to_numpy()
            )
            for which, chosen in (("matched", pairs), ("random", pairs.assign(joint=mixed))):
                for name in SCORES:
                    found = compare(chosen, mine, name, resamples)
                    about = {"judge": judge, "against": against, "pairs": which, "score": name}
                    rows.append(about | found)
    return pd.DataFrame(rows)


def figure_2(asked: Mapping[str, pd.DataFrame], scores: pd.DataFrame) -> pd.DataFrame:
    """`density_difference` of fuzzing scores over each judge's pairs, with a column judge."""
    frames = []
    for judge, pairs in asked.items():
        chosen = pairs[pairs.against == "solo"]
        both = _of_pairs(chosen, scores[scores.judge == judge], "fuzzing").dropna()
        if len(both):
            frames.append(density_difference(both.base, both.joint).assign(judge=judge))
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


def published_values(found: Mapping[str, Any], matched: int) -> pd.DataFrame:
    """A fuzzing comparison (`compare`) under the ids of the paper's values (§5.2, §4, §6).

    Columns: id, value, low, high, scatter (deviation of one seed's), words.
    """

    def values(*names: str) -> list[Any]:
        return [found.get(name, np.nan) for name in names]

    (solo,), delta, alone = values("base"), values("delta", "low", "high", "scatter"), [np.nan] * 3
    change = [100 * value / solo if solo > 0 else np.nan for value in delta]
    share = [100 * value for value in values("higher", "higher_low", "higher_high")]  # of pairs
    rows = {
        "gpt2-large.fuzz_joint_mean": [*values("joint"), *alone],
        "gpt2-large.fuzz_solo_mean": [solo, *alone],
        "gpt2-large.fuzz_paired_delta": delta,
        "gpt2-large.fuzz_delta_pct": change,
        "gpt2-large.fuzz_paired_t": [*values("t"), *alone],
        "gpt2-large.fuzz_paired_p": [*values("p"), *alone],
        "gpt2-large.fuzz_joint_higher_pct": [*share, np.nan],
        "gpt2-large.matched_pairs": [matched, *alone],
        "gemma-2-9b.fuzz_delta_pct_selected": change,
    }
    frame = pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high", "scatter"])
    return frame.rename_axis("id").reset_index().assign(words="")
