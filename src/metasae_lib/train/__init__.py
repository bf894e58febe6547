"""Residuals → dictionaries."""

from __future__ import annotations

from metasae_lib.train.dictionary import (
    BatchTopK,  # keeps the k·b largest of a batch
    Dictionary,  # what both kinds share: weights, products, files
    JumpReLU,  # keeps what exceeds a trained threshold
    denormalise,  # the way back
    normalise,  # per-token normalisation
)
from metasae_lib.train.penalty import (
    decomposability,  # how easily a row is rebuilt (Eq. 2)
    decomposability_penalty,  # its mean over the decoder (Eq. 2-3)
    penalty_pull,  # its gradient by hand
)
from metasae_lib.train.posthoc import meta_posthoc  # a meta SAE on finished decoders
from metasae_lib.train.training import (
    Arm,  # a trained arm: its dictionaries and history
    load_arms,  # the trained arms of a run
    train_arms,  # train every arm of a run from one stream
)
