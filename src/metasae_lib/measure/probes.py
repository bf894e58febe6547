"""Sparse probing: how much a few features of a dictionary tell of a label that people gave.

A probe sees the activations at the last token of a text (`subject.labelled`). Its k features are
those with the largest |difference of class means| on the training half, each activation divided by
the mean of its feature where it fires, as the package sae-probes does; a logistic regression on
these k is judged on the other half. The classes are equally frequent: guessing is right half of
the time and has an AUC of 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metasae_lib.measure.passes import Entered, by_arm, pre_activations, product_dtype
from metasae_lib.measure.patterns import Array
from metasae_lib.measure.thresholds import calibrate_arms, calibration_inputs
from metasae_lib.study import Artefact, Run, atomic_write, progress
from metasae_lib.subject import Residuals
from metasae_lib.subject.labelled import TEXTS, labelled_inputs, labelled_residuals, labelled_texts
from metasae_lib.train import Arm

KS = (1, 5)  # features of a probe
_COLUMNS = ["task", "k", "auc", "accuracy"]
_VERSION = 1


def probe_arms(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Probes on the features of every arm, and on its rivals; artefacts, one an arm.

    The rivals: `random`, for every seed as many random directions as an arm has features, of which
    a probe takes the best k likewise; `dense`, a probe on the whole residual (its k is d), with a
    penalty chosen by cross-validation within the training half. Columns: arm, kind, seed, task, k,
    auc, accuracy.
    """
    calibrate_arms(run, arms)
    n, texts = run.profile.dictionary.n_features, {"texts": labelled_inputs(run), "ks": list(KS)}
    calibration = calibration_inputs(run, Residuals(run, "calibration"))
    rule = {"calibration": calibration, "rule": run.profile.evaluation.threshold_rule}
    rivals = [f"random-seed{seed}" for seed in run.profile.training.seeds] + ["dense"]
    inputs = by_arm(arms, texts | rule) | {name: {"rival": name, "n": n} | texts for name in rivals}

    def make(missing: dict[str, Artefact]) -> None:
        given = Entered(labelled_residuals(run))
        labelled = labelled_texts()
        with progress(len(missing), "probes") as bar:
            for name, artefact in missing.items():
                rows: list[tuple[Any, ...]] = []
                arm = arms.get(name)
                z = given.of(arm.sae) if arm else given.z
                for part, (task, (_, y)) in zip(z.split(TEXTS), labelled.items(), strict=True):
                    if name == "dense":
                        rows.append((task, z.shape[1], *dense_probe(part.numpy(), y)))
                        continue
                    x = _activations(run, arm, part) if arm else _random(part, n, name)
                    rows += [(task, k, *sparse_probe(x, y, k)) for k in KS]
                with atomic_write(artefact.folder / "scores.csv") as path:
                    pd.DataFrame(rows, columns=_COLUMNS).to_csv(path, index=False)
                artefact.finish()
                bar.update()

    frames = []
    for name, artefact in run.made("probes", inputs, _VERSION, make).items():
        kind, _, seed = name.partition("-seed")
        about = (arms[name].spec.kind, arms[name].spec.seed) if name in arms else (kind, seed)
        scores = pd.read_csv(artefact.folder / "scores.csv")
        frames.append(scores.assign(arm=name, kind=about[0], seed=pd.to_numeric(about[1])))
    return pd.concat(frames, ignore_index=True)[["arm", "kind", "seed", *_COLUMNS]]


def choose(x: Array, y: Array, k: int) -> Array:
    """The k columns with the largest |difference of class means|, largest first.

    x: (m, n) activations, y: (m,) 0 or 1. Columns are first divided by the mean size of their
    values that are not zero, so that none is chosen for being large.
    """
    size = np.abs(x).sum(axis=0) / np.maximum((x != 0).sum(axis=0), 1)
    gap = np.abs(x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0)) / np.where(size > 0, size, 1)
    return np.argsort(-gap, kind="stable")[:k]


def sparse_probe(x: Array, y: Array, k: int) -> tuple[float, float]:
    """AUC and accuracy on the second half of the rows, of a probe chosen and fitted on the first.

    x: (m, n), y: (m,) 0 or 1. Scikit-learn's logistic regression as it comes (L2, C = 1).
    """
    from sklearn.linear_model import LogisticRegression

    half = len(x) // 2
    return _judged(LogisticRegression(max_iter=1000), x[:, choose(x[:half], y[:half], k)], y)


def dense_probe(x: Array, y: Array) -> tuple[float, float]:
    """The same of a probe on all columns, C from 10⁻⁵ to 10 by five-fold cross-validation."""
    from sklearn.linear_model import LogisticRegressionCV

    model = LogisticRegressionCV(
        Cs=np.logspace(-5, 1, 7), l1_ratios=(0,), cv=5, scoring="roc_auc", max_iter=1000,
        use_legacy_attributes=False,
    )  # fmt: skip
    return _judged(model, x, y)


def _judged(model: Any, x: Array, y: Array) -> tuple[float, float]:
    from sklearn.metrics import roc_auc_score

    half = len(x) // 2
    model.fit(x[:half], y[:half])
    auc = roc_auc_score(y[half:], model.decision_function(x[half:]))
    return float(auc), float((model.predict(x[half:]) == y[half:]).mean())


def _activations(run: Run, arm: Arm, z: Tensor) -> Array:
    """(m, n) activations above the thresholds."""
    assert arm.sae.threshold is not None
    pre = pre_activations(arm.sae, z.to(arm.sae.b_dec.device), product_dtype(run))
    acts: Array = (pre * (pre > arm.sae.threshold)).float().cpu().numpy()
    return acts


def _random(z: Tensor, n: int, name: str) -> Array:
    """(m, n) products with random directions, drawn by the seed that a rival's name ends with."""
    generator = torch.Generator().manual_seed(int(name.removeprefix("random-seed")))
    directions = torch.randn(z.shape[1], n, generator=generator)
    products: Array = (z @ (directions / directions.norm(dim=0))).numpy()
    return products
