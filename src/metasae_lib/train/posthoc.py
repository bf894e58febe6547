"""A meta SAE on the frozen decoder of a finished arm (Bussmann et al. 2024).

It measures what the penalty of Eq. 2 works against, with a critic that the arm never saw: the
share of the decoder's variance that a small dictionary explains. Two settings:

- ``bussmann``: the joint arms' own meta dictionary (width, k, learning rate, and as many steps),
  all rows at once;
- ``saebench``: that of SAEBench's meta-structure measure: a quarter of the width, k 4, 1,500 steps
  of 1,024 rows, learning rate 5e-4.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from metasae_lib.study import Profile, Run, progress
from metasae_lib.train.dictionary import BatchTopK, denormalise, normalise
from metasae_lib.train.learner import Learner, Settings, one_thread_if_small
from metasae_lib.train.training import Arm

_VERSION = 1


def variance_explained(W_dec: Tensor, meta: BatchTopK) -> float:
    """1 - |W - What|² / |W - mean row|², in decoder space. W_dec: (n, d) decoder rows."""
    rows, mean, std = normalise(W_dec)
    missed = W_dec - denormalise(meta.decode(meta.encode(rows)), mean, std)
    return float(1 - missed.square().sum() / (W_dec - W_dec.mean(0)).square().sum())


def train_meta(W_dec: Tensor, setting: Mapping[str, float], dtype: torch.dtype) -> BatchTopK:
    """A meta dictionary of frozen decoder rows (n, d). setting: see :func:`settings`."""
    rows = normalise(W_dec)[0]
    n, batch = len(rows), int(setting["batch"])
    meta = BatchTopK(rows.shape[1], int(setting["width"]), int(setting["k"])).to(W_dec.device)
    learner = Learner(meta, Settings(setting["learning_rate"], dtype=dtype, k_aux=len(meta.W_dec)))
    generator = torch.Generator().manual_seed(0)
    with one_thread_if_small(batch * rows.shape[1] * meta.n_features):
        for _ in range(int(setting["steps"])):
            if batch < n:
                drawn = torch.randperm(n, generator=generator)[:batch].to(rows.device)
                learner.step(rows[drawn])
            else:
                learner.step(rows)
    return meta


def settings(profile: Profile) -> dict[str, dict[str, float]]:
    """Width, k, steps, rows of a batch and learning rate of each setting that is asked for."""
    sizes, training = profile.dictionary, profile.training
    n = sizes.n_features
    both: dict[str, dict[str, float]] = {
        "bussmann": {
            "width": sizes.n_meta_features,
            "k": sizes.meta_k,
            "steps": profile.steps * training.n_meta_steps // training.n_primary_steps,
            "batch": n,
            "learning_rate": training.meta_learning_rate,
        },
        "saebench": {
            "width": max(4, n // 4),
            "k": 4,
            "steps": 1500,
            "batch": min(1024, n),
            "learning_rate": 5e-4,
        },
    }
    return {name: both[name] for name in training.meta_posthoc}


def meta_posthoc(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Train a meta SAE on each arm's decoder under each setting of `training.meta_posthoc`.

    Columns: arm, setting, variance_explained. Results are artefacts: a second call reads them.
    """
    asked = [(name, *setting) for name in arms for setting in settings(run.profile).items()]
    dtype: torch.dtype = getattr(torch, run.profile.training.dtype)
    rows = []
    for name, setting, how in progress(asked, "meta SAEs on frozen decoders"):
        inputs = {"arm": arms[name].folder.name, "setting": how, "dtype": str(dtype)}
        artefact = run.artefact("meta-posthoc", inputs, _VERSION)
        with artefact.lock():
            if not artefact.complete:
                W_dec = arms[name].sae.directions.detach()
                meta = train_meta(W_dec, how, dtype)
                meta.save(artefact.folder / "meta")
                artefact.finish({"variance_explained": variance_explained(W_dec, meta)})
        explained = artefact.info["variance_explained"]
        rows.append({"arm": name, "setting": setting, "variance_explained": explained})
    return pd.DataFrame(rows, columns=["arm", "setting", "variance_explained"])
