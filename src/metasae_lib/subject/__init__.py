"""Text → tokens → residuals.

- `load_tokens`: token rows of every role of a run
- `load_tokenizer`: the language model's tokenizer
- `load_subject`: the language model, to its layer and beyond
- `Residuals`: residuals of a role's tokens, chunk by chunk
- `BatchStream`: shuffled batches of them, for every arm
"""

from __future__ import annotations

from metasae_lib.subject.activations import BatchStream, Residuals
from metasae_lib.subject.corpus import load_tokenizer, load_tokens
from metasae_lib.subject.model import load_subject
