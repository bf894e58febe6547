"""Residuals → dictionaries.

- `decomposability`: how easily a row is rebuilt (Eq. 2)
- `decomposability_penalty`: its mean over the decoder (Eq. 2-3)
- `penalty_pull`: its gradient by hand
- `normalise`: per-token normalisation
- `denormalise`: the way back
- `BatchTopK`: keeps the k·b largest of a batch
- `JumpReLU`: keeps what exceeds a trained threshold
- `Arm`: a trained arm: its dictionaries and history
- `train_arms`: train every arm of a run from one stream
- `load_arms`: the trained arms of a run
- `meta_posthoc`: a meta SAE on finished decoders
"""

from __future__ import annotations

from metasae_lib.train.dictionary import BatchTopK, JumpReLU, denormalise, normalise
from metasae_lib.train.penalty import decomposability, decomposability_penalty, penalty_pull
from metasae_lib.train.posthoc import meta_posthoc
from metasae_lib.train.training import Arm, load_arms, train_arms
