"""The inner loops of a training step: exact batch top-k, sparse decoding, fused row updates.

BatchTopK keeps ``k`` of ``n`` activations per token, so that all of a training step but the encoder
product needs only those. On a CPU its loops are compiled by numba (`compiled`); each stands beside
its plain torch form of the same name (`plain`), which does the same with dense matrices: it is what
runs on a GPU and what the compiled form is tested against.

Every output row is summed by one thread in a fixed order: the result does not depend on timing.

Shapes: ``b`` inputs (tokens, or decoder rows for a meta dictionary), ``d`` dimensions, ``n``
features. ``W_enc_T`` is the encoder stored feature by feature, (n, d).
"""

from __future__ import annotations

from metasae_lib.train.kernels import compiled, plain
