"""Text → tokens → residuals."""

from __future__ import annotations

from metasae_lib.subject.activations import (
    BatchStream,  # shuffled batches of them, for every arm
    Residuals,  # residuals of a role's tokens, chunk by chunk
)
from metasae_lib.subject.corpus import (
    Tokens,  # token rows by role, with their hashes and sources
    load_tokenizer,  # the language model's tokenizer
    load_tokens,  # token rows of every role of a run
)
from metasae_lib.subject.labelled import TASKS  # sets of labelled texts, and what they ask
from metasae_lib.subject.model import (
    Subject,  # the model: residuals, losses, logits
    load_subject,  # the language model, to its layer and beyond
    subject_of,  # a run's, loaded once
)
from metasae_lib.subject.world import (
    Samples,  # samples of a world, with the atoms that fire
    SampleStream,  # batches of them, for every arm
    World,  # known atoms, and how they fire
    samples,  # a run's, by role
    world_of,  # a run's, made once
)
