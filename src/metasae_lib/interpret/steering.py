"""Steering: one feature taken out of the residual stream, or amplified, and what the model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor

from metasae_lib.subject import Subject
from metasae_lib.train import Dictionary
from metasae_lib.train.dictionary import enter


def scaled(
    sae: Dictionary, feature: int, factor: float, first: int = 0
) -> Callable[[Tensor], Tensor]:
    """A replacement for `Subject.loss`: one feature's contribution times `factor`.

    factor: 0 removes it, 1 changes nothing, 2 doubles it. Where feature i has the activation a_i
    (above its threshold), (factor - 1) a_i W_i is added in the dictionary's space and mapped
    back; everything else of the residual stays, what the dictionary cannot rebuild included.
    first: positions before it stay as they are (1 under `text.skip_first`: no dictionary has seen
    position 0).
    """

    def replace(x: Tensor) -> Tensor:
        z, _, scale = enter(x.float(), sae.space)
        acts = sae.encode_threshold(z.flatten(0, -2))[:, feature].view(*z.shape[:-1], 1)
        acts[:, :first] = 0
        return x + (factor - 1) * acts * sae.W_dec[feature] * scale

    return replace


def next_tokens(
    subject: Subject,
    ids: Tensor,
    replacements: Mapping[str, Callable[[Tensor], Tensor]],
    decode: Callable[[int], str],
    n_top: int = 6,
) -> pd.DataFrame:
    """Probabilities of the next token of one row of ids (c,), as it is and under replacements.

    One row a token: those among the `n_top` likeliest before or under any replacement. Columns:
    token, unchanged, one a replacement, and `change <name>` in percentage points; likeliest first.
    """
    p = {
        name: subject.next_logits(ids[None], replace)[0].softmax(-1)
        for name, replace in {"unchanged": None, **replacements}.items()
    }
    tops = torch.cat([each.topk(n_top).indices for each in p.values()])
    shown = sorted(set(tops.tolist()), key=lambda i: -float(p["unchanged"][i]))
    columns = {name: each[shown].tolist() for name, each in p.items()}
    frame = pd.DataFrame({"token": [decode(i) for i in shown], **columns})
    for name in replacements:
        frame[f"change {name}"] = 100 * (frame[name] - frame.unchanged)
    return frame
