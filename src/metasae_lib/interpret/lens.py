"""Logit lens: the tokens that a feature's decoder row promotes and suppresses by itself.

A row lives in the space of normalised residuals, whose axes are those of the residual stream: the
normalisation only shifts and scales a token as a whole. So the row itself is what the feature adds
to the stream, and it is read off as `Subject.direct_logits` does. What the blocks after the layer
make of it, and what else the residual holds when the norm is taken, is left out: the lens says
something about late layers, and little about early ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from metasae_lib.interpret.examples import Array, Pieces
from metasae_lib.measure.passes import by_arm
from metasae_lib.study import Artefact, Run, atomic_write, progress
from metasae_lib.subject import load_tokenizer, subject_of
from metasae_lib.subject.model import fingerprint
from metasae_lib.train import Arm

COUNT = 10  # tokens kept at either end
_VERSION = 1


@dataclass(frozen=True)
class Lens:
    """What the n features of one arm do to the logits.

    names and values: (n, 2, c) tokens, and by how much each one's logit lies above the mean over
    the vocabulary; first those that are promoted most, then those that are suppressed most.
    """

    names: Array
    values: Array

    def first(self, count: int) -> Lens:
        """The first `count` tokens at either end."""
        return Lens(self.names[..., :count], self.values[..., :count])

    def of(self, feature: int) -> list[list[tuple[str, float]]]:
        """(token, value) of the promoted ones, strongest first, and of the suppressed ones."""
        ends = zip(self.names[feature].tolist(), self.values[feature].tolist(), strict=True)
        return [list(zip(*end, strict=True)) for end in ends]


def logit_lens(run: Run, arms: Mapping[str, Arm]) -> dict[str, Lens]:
    """The lens of every arm, by name; artefacts.

    The language model is loaded if there is one to be made. Ids beyond the tokenizer's, with which
    some vocabularies are padded, are no tokens and are left out.
    """
    tokenizer = load_tokenizer(run.profile)

    def make(missing: Mapping[str, Artefact]) -> None:
        subject = subject_of(run)
        n = sum(arms[name].sae.n_features for name in missing)
        with progress(n, f"logit lens of {len(missing)} arms") as bar:
            for name, artefact in missing.items():
                found = []
                for logits in subject.direct_logits(arms[name].sae.W_dec):
                    logits = logits[:, : len(tokenizer)]
                    ends = [logits.topk(COUNT, largest=end) for end in (True, False)]
                    values, ids = (torch.stack(each, 1) for each in zip(*ends, strict=True))
                    found.append((values - logits.mean(1)[:, None, None], ids))
                    bar.update(len(logits))
                values, ids = (torch.cat(each) for each in zip(*found, strict=True))
                with atomic_write(artefact.folder / "lens.npz") as path:
                    np.savez(path, ids=ids.int().cpu(), values=values.cpu())
                artefact.finish()

    inputs = {"model": fingerprint(run.profile), "tokens": len(tokenizer), "count": COUNT}
    made = run.made("lens", by_arm(arms, inputs), _VERSION, make)
    pieces, lenses = Pieces(tokenizer), {}
    for name, artefact in made.items():
        with np.load(artefact.folder / "lens.npz") as arrays:
            ids, values = arrays["ids"], arrays["values"]
        used, places = np.unique(ids, return_inverse=True)
        # A special token is no text, and goes by its name.
        names = [pieces([i])[0] or str(tokenizer.convert_ids_to_tokens(i)) for i in used.tolist()]
        lenses[name] = Lens(np.array(names, object)[places.reshape(ids.shape)], values)
    return lenses
