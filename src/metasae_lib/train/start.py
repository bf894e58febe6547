"""What training takes out of its inputs: a constant vector, and the scale of each dimension.

In many models a few dimensions are massive, and much the same on every token: in Gemma 3 270M three
hold 97% of the mean square of z, and most of that is one constant vector. A dictionary that starts
at zero spends its features on it. So training may see (z - shift) / scale instead of z:

- `zeros`: z as it is, the paper's choice (§4);
- `mean`: shift is the mean of z over the first chunk of the training text;
- `standard`: besides, scale is the standard deviation of each dimension there.

The trained dictionary is folded back, so that it reads z like any other: the pre-activations stay
what they were, and decoder rows are as long as `scale` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metasae_lib.study import TrainingError
from metasae_lib.train.dictionary import Dictionary

Name = Literal["zeros", "mean", "standard"]


@dataclass(frozen=True)
class Start:
    """shift, scale: (d,) float32."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, name: Name, z: Tensor) -> Start:
        """The start of a name, out of normalised tokens z (t, d). Raises `TrainingError`."""
        shift, scale = torch.zeros_like(z[0]), torch.ones_like(z[0])
        if name != "zeros":
            shift = z.double().mean(0).to(z)
        if name == "standard":
            scale = z.double().std(0).to(z)
            if not bool((scale > 0).all()):
                raise TrainingError(
                    "a dimension of the residual never varies: set training.start to mean"
                )
        return cls(shift, scale)

    def apply(self, z: Tensor) -> Tensor:
        """What training sees of z (b, d)."""
        return (z - self.shift) / self.scale

    def fold(self, sae: Dictionary) -> Dictionary:
        """A dictionary trained on `apply(z)` as one that reads z itself and gives the same."""
        folded = type(sae)(sae.d_in, sae.n_features, sae.k, sae.seed)
        scale = self.scale.to(sae.W_dec)
        folded.W_enc.data = (sae.W_enc.T / scale).T
        folded.W_dec.data = sae.W_dec * scale
        folded.b_dec.data = sae.b_dec * scale + self.shift.to(sae.b_dec)
        folded.threshold, folded.scale = sae.threshold, scale.cpu()
        return folded
