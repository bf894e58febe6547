"""From final hidden states to logits, block by block, as the model's own forward pass does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metasae_lib.study import SubjectError

#: Rows of logits are made in blocks of so many bytes in float32.
BLOCK_BYTES = 80 * 2**20


class Head:
    """What a causal language model does behind its last block: unembed, scale, cap.

    unembed: hidden states (..., d) to raw logits (..., vocabulary). config: the model's own, of
    which an architecture takes a factor on the logits (Granite, Cohere) and a soft cap (Gemma 2).
    """

    def __init__(self, unembed: Callable[[Tensor], Tensor], config: Any) -> None:
        self._unembed = unembed
        config = config.get_text_config()
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        factors = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        # Some architectures divide, some multiply, and folding may have taken the factor in.
        known = [s for factor in factors if factor for s in (float(factor), 1 / float(factor))]
        self._scales = [1.0, *known]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) in float32."""
        return self._logits(self._unembed(hidden), self._scales[0])

    def blocks(self, hidden: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
        """Hidden states (t, d) in parts whose logits take about `BLOCK_BYTES`."""
        return hidden.split(max(1, BLOCK_BYTES // (4 * vocabulary)))

    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Compare with the logits that the model made of the same states.

        Raises `SubjectError` on an architecture that does more to its logits than is known here.
        """
        raw, logits = self._unembed(hidden), logits.float()
        tolerance = 0.02 * logits.abs().max()  # bfloat16 products of other shapes differ a little
        for scale in self._scales:
            if bool(((self._logits(raw, scale) - logits).abs() <= tolerance).all()):
                self._scales = [scale]
                return
        raise SubjectError(
            "this model scales its logits in a way that its cross-entropy here does not cover: "
            "choose another model"
        )

    def _logits(self, raw: Tensor, scale: float) -> Tensor:
        logits = raw.float()
        if scale != 1:
            logits = logits * scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits
