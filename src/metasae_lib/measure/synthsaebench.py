"""SynthSAEBench's scores: whether features tell which atoms fire, and point where atoms point.

As SAELens 6.54 defines them (`sae_lens.synthetic.evals`), which they equal on the same inputs. Each
feature stands for one atom, that of the largest |cosine| with its decoder row:

    F1          2 TP / (2 TP + FP + FN) of "the feature fires" for "its atom fires", mean over
                features; 0 for one that is never right
    uniqueness  share of distinct atoms among those that features stand for
    MCC         mean |cosine| of rows and atoms matched one to one (Hungarian)

with the dictionary in its training form, BatchTopK over a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metasae_lib.measure.fidelity import Active, Mode, Moments, Reconstruction, decoded, selected
from metasae_lib.measure.pairs import between
from metasae_lib.measure.passes import by_arm, pre_activations, product_dtype
from metasae_lib.measure.statistics import paired_difference
from metasae_lib.study import Artefact, Run, progress, repository_folders
from metasae_lib.study.kept import KeptRun
from metasae_lib.subject import Samples, samples, world_of
from metasae_lib.train import Arm, JumpReLU, train_arms

_VERSION = 1
_KEPT = "synthsaebench-reference", "synthsaebench"  # the first that is there is shown
_COLUMNS = [
    "arm", "kind", "seed", "lambda2", "sigma_sq", "k", "samples", "f1", "mcc", "uniqueness",
    "variance_explained", "l2", "l0", "dead", "held_out",
]  # fmt: skip
MEASURES = ("f1", "mcc", "uniqueness", "variance_explained")


def abs_cosines(rows: Tensor, atoms: Tensor) -> Tensor:
    """|cosine| of decoder rows (n, d) with atoms (m, d): (n, m) float32."""
    return (F.normalize(rows, dim=1) @ F.normalize(atoms, dim=1).T).abs_()


def mcc(cosines: Tensor) -> float:
    """Mean of |cosine| (n, m) over the one-to-one matching with the largest sum."""
    rows, atoms = linear_sum_assignment((1 - cosines).double().numpy())
    return float(cosines[rows, atoms].mean(dtype=torch.float64))


def uniqueness(matches: np.ndarray) -> float:
    """Share of distinct atoms among those that features stand for. matches: (n,)."""
    return len(np.unique(matches)) / len(matches)


class Detection:
    """Counts of when features fire and when the atoms that they stand for do.

    matches: (n,), each feature's atom.
    """

    def __init__(self, matches: np.ndarray, n_atoms: int) -> None:
        self._matches, n = matches, len(matches)
        self.both, self.fired = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._true = np.zeros(n_atoms, np.int64)

    def add(self, found: Active, given: Samples) -> None:
        """Add a batch: what fires of the features, and of the atoms."""
        n, n_atoms = len(self._matches), len(self._true)
        is_on = np.zeros((len(given.x), n_atoms), bool)
        is_on[_rows(given.starts), given.atoms] = True
        right = is_on[_rows(found.starts), self._matches[found.features]]
        self.both += np.bincount(found.features[right], minlength=n)
        self.fired += np.bincount(found.features, minlength=n)
        self._true += np.bincount(given.atoms, minlength=n_atoms)

    def f1(self) -> float:
        """Mean over features."""
        either = self.fired + self._true[self._matches]  # 2 TP + FP + FN
        return float((2 * self.both / np.maximum(either, 1)).mean())


def _rows(starts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def scores(run: Run) -> tuple[pd.DataFrame, str]:
    """`score_arms` of a run that studies the benchmark, or of the run that is kept in `results/`;
    no rows if none is. With it, what the table is about."""
    about = "SynthSAEBench-16k: every arm on held-out samples"
    if run.profile.synthetic:
        return score_arms(run, train_arms(run)), about
    for results in repository_folders("results"):
        for folder in filter(Path.is_dir, (results / name for name in _KEPT)):
            kept = KeptRun(folder)
            made = kept.provenance()
            frame = kept.load_table("synthsaebench")
            return frame, f"{about}, kept run of {made['date'][:10]}, commit {made['commit'][:8]}"
    return pd.DataFrame(columns=_COLUMNS), f"{about}: no run is kept"


def score_arms(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Every arm on the same held-out samples, one row an arm. Results are artefacts.

    Columns: arm, kind, seed, lambda2, sigma_sq, k, samples (it was trained on); f1, mcc,
    uniqueness; variance_explained (1 - FVU), l2 and l0 (see `fidelity`, of samples as they are);
    dead (features that never fire), held_out (samples).
    """

    def make(missing: dict[str, Artefact]) -> None:
        for name, found in _scores(run, {name: arms[name] for name in missing}).items():
            missing[name].finish({"scores": found})

    training, held_out = run.profile.training, run.profile.text.roles["scan"]
    on = {"held_out": held_out, "batch": training.batch_tokens, "dtype": training.dtype}
    found = run.made("synthsaebench", by_arm(arms, on), _VERSION, make)
    samples_seen = run.profile.steps * training.batch_tokens
    rows = [
        {"arm": name, "samples": samples_seen, **vars(arms[name].spec), **artefact.info["scores"]}
        for name, artefact in found.items()
    ]
    return pd.DataFrame(rows)[_COLUMNS]


def _scores(run: Run, arms: Mapping[str, Arm]) -> dict[str, dict[str, float]]:
    world, size, dtype = world_of(run), run.profile.training.batch_tokens, product_dtype(run)
    moments, saes = Moments(world.spec.d), {name: arm.sae.cpu() for name, arm in arms.items()}
    found, detections = dict[str, dict[str, float]](), dict[str, Detection]()
    with progress(len(saes), "matching features and atoms") as bar:
        for name, sae in saes.items():
            cosines = abs_cosines(sae.directions, world.atoms)
            matches = cosines.argmax(1).numpy()
            found[name] = {"mcc": mcc(cosines), "uniqueness": uniqueness(matches)}
            detections[name] = Detection(matches, world.spec.n_atoms)
            bar.update()
    sums, brackets = {name: Reconstruction(moments) for name in saes}, dict.fromkeys(saes, 0)
    n_batches = -(-run.profile.text.roles["scan"] // size)
    with progress(n_batches * size, f"scores of {len(saes)} arms") as bar:
        for index in range(n_batches):
            given = samples(run, "scan", index, size)
            moments.add(given.x)
            for name, sae in saes.items():
                pre = pre_activations(sae, given.x, dtype)
                mode: Mode = "threshold" if isinstance(sae, JumpReLU) else "batch"
                active, brackets[name] = selected(sae, pre, mode, brackets[name])
                detections[name].add(active, given)
                sums[name].add(given.x, decoded(sae, active), len(active.acts))
            bar.update(size)
    for name in saes:
        fired, kept = detections[name].fired, sums[name]
        found[name] |= {
            "f1": detections[name].f1(), "variance_explained": 1 - kept.fvu, "l2": kept.l2,
            "l0": kept.l0, "dead": int((fired == 0).sum()), "held_out": moments.n_tokens,
        }  # fmt: skip
    return found


def settings(scores: pd.DataFrame) -> pd.Series[str]:
    """Each arm's name without its seed."""
    return scores.arm.astype(str).str.replace(r"-seed\d+$", "", regex=True)


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Every setting against the solo arm of the same seed, as it is and at equal L2.

    scores: of `score_arms`. At equal L2: against the straight lines that join the seed's solo and
    frontier arms; beyond their ends there is nothing to compare with. Columns: setting (an arm
    without its seed), kind, lambda2, against (`solo`, `equal L2`), measure (of `MEASURES`),
    difference with low and high for new seeds (a t interval of the pairs), n_seeds.
    """
    measures, rows = list(MEASURES), []
    others = scores[scores.kind != "solo"]
    for name, same in others.groupby(settings(others), sort=False):
        kind = same.kind.iloc[0]
        for against in ("solo", "equal L2"):
            if against == "equal L2" and kind == "frontier":
                continue
            kinds = ["solo"] if against == "solo" else ["solo", "frontier"]
            changes = []
            for _, arm in same.iterrows():
                curve = scores[scores.kind.isin(kinds) & (scores.seed == arm.seed)]
                curve = curve.sort_values("l2")
                at = arm.l2 if against == "equal L2" else curve.l2.min()
                base = between(curve.l2.to_numpy(), at) @ curve[measures].to_numpy(np.float64)
                changes.append(arm[measures].to_numpy(np.float64) - base)
            for measure, change in zip(measures, np.array(changes).T, strict=True):
                effect = paired_difference(change)
                ends = effect.difference, effect.low, effect.high
                n_seeds = int(np.isfinite(change).sum())
                rows.append((name, kind, same.lambda2.iloc[0], against, measure, *ends, n_seeds))
    columns = ["setting", "kind", "lambda2", "against", "measure"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high", "n_seeds"])
