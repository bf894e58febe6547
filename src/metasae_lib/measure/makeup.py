"""What the residual is made of: whether few dimensions, or one constant, are most of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from metasae_lib.study import Run
from metasae_lib.subject import Residuals
from metasae_lib.train import normalise
from metasae_lib.train.start import Start

DOMINATED = 0.5  # share of the mean square in a few dimensions from which a run is warned
FEW = 3


def residual_makeup(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the residuals of the first chunk of the training text are made of.

    First, shares of the normalised residual z by dimension. Columns: rank (by share, from 1),
    dimension, share (of the mean square of z), varying (of the variance of z around its mean),
    trained (of the mean square of what training sees under `training.start`), and the same in every
    row: mean_share (of the mean square of z in its constant mean vector). The ten largest
    dimensions, then the others together (dimension −1).
    Second, the mean norm of the raw residual by position. Columns: position, norm.
    """
    x = Residuals(run, "train").chunk(0).float()
    z = normalise(x)[0]
    start = Start.of(run.profile.training.start, z)
    square, varying = z.double().square().mean(0), z.double().var(0, correction=0)
    trained = start.apply(z).double().square().mean(0)
    order = torch.argsort(square, descending=True, stable=True)
    parts = [(part / part.sum())[order].cpu().numpy() for part in (square, varying, trained)]
    top = min(10, len(order))
    rows = [[*part[:top], part[top:].sum()] for part in parts]
    frame = pd.DataFrame(dict(zip(("share", "varying", "trained"), rows, strict=True)))
    frame.insert(0, "dimension", [*order[:top].tolist(), -1])
    frame.insert(0, "rank", np.arange(1, top + 2))
    shares = frame.assign(mean_share=1 - float(varying.sum() / square.sum()))
    text = run.profile.text
    norms = x.norm(dim=1).view(-1, text.kept_per_row).double().mean(0).cpu().numpy()
    first = text.context_length - text.kept_per_row
    positions = np.arange(first, text.context_length)
    return shares, pd.DataFrame({"position": positions, "norm": norms})
