"""Short texts with labels that people gave, for sparse probes, and the residuals at their ends.

They are those of the package sae-probes (Kantamneni et al. 2025), read out of its pinned wheel as
the embedded text is: no hub is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor

from metasae_lib.study import Artefact, Run, atomic_write, progress
from metasae_lib.study.known import LABELLED, WHEELS
from metasae_lib.subject.activations import Residuals
from metasae_lib.subject.corpus import load_tokenizer
from metasae_lib.subject.embedded import wheel, wheel_files
from metasae_lib.subject.model import subject_of

#: Sets of short texts of the package, one of each kind, chosen before any result; what is asked.
TASKS = {
    "5_hist_fig_ismale": "a man's name?",
    "21_headline_istrump": "a headline on Trump?",
    "65_high-school": "goes on with “school”?",
    "87_glue_cola": "grammatical?",
    "92_glue_sst2": "a good review?",
    "96_spam_is": "spam?",
    "105_click_bait": "click bait?",
    "114_nyc_borough_Manhattan": "in Manhattan?",
    "123_world_country_United_Kingdom": "in the United Kingdom?",
    "126_art_type_book": "a book's title?",
    "130_temp_cat_Frequency": "asks how often?",
    "154_athlete_sport_football": "a footballer?",
}
TEXTS = 600  # of each task
_SEED = 0
_VERSION = 1


def labelled_texts() -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    """TEXTS texts and their labels (0 or 1) of every task, drawn by seed.

    Classes take turns, so that they are equally frequent in any part. `CorpusError` if the wheel
    cannot be had.
    """
    found = {}
    for task in TASKS:
        path = rf"sae_probes/data/cleaned_data/{re.escape(task)}\.csv\.zst"
        (content,) = wheel_files(wheel(LABELLED), path)
        packed = pyarrow.BufferReader(content)
        frame = pd.read_csv(pyarrow.CompressedInputStream(packed, "zstd"))
        labels = pd.factorize(frame.target, sort=True)[0]
        order = np.random.default_rng(_SEED).permutation(len(frame))
        each = [order[labels[order] == label][: TEXTS // 2] for label in (0, 1)]
        rows = np.stack(each, axis=1).ravel()
        found[task] = frame.prompt.astype(str).iloc[rows].tolist(), labels[rows]
    return found


def labelled_inputs(run: Run) -> dict[str, Any]:
    """What the residuals of the labelled texts depend on, for keys."""
    of_text = Residuals(run, "scan").inputs
    return {
        "wheel": WHEELS[LABELLED].sha256, "tasks": list(TASKS), "texts": TEXTS, "seed": _SEED,
        **run.profile.text.model_dump(include={"bos", "context_length"}),
        **{key: of_text[key] for key in ("model", "batch_rows")},
    }  # fmt: skip


def labelled_residuals(run: Run) -> Tensor:
    """Residuals (tasks · TEXTS, d) at the last token of every labelled text, float32; an artefact.

    A text begins with BOS where the rows of the profile do. One that is longer than a row keeps its
    end. On a shorter one follows filling, which no token before it sees.
    """

    def make(missing: Mapping[str, Artefact]) -> None:
        subject, found = subject_of(run), list[Tensor]()
        ids = _ids(run)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        room = run.profile.model.batch_rows * run.profile.text.context_length
        with progress(len(ids), "residuals of labelled texts") as bar:
            while len(found) < len(ids):
                longest = len(ids[order[len(found)]])
                batch = [ids[i] for i in order[len(found) :][: room // longest]]
                rows = np.array([one + [0] * (longest - len(one)) for one in batch])
                x = subject.residuals(rows).float().cpu()
                found += [row[len(one) - 1] for row, one in zip(x, batch, strict=True)]
                bar.update(len(batch))
        with atomic_write(missing[""].folder / "residuals.npy") as path:
            np.save(path, torch.stack(found)[np.argsort(order)].numpy())
        missing[""].finish()

    made = run.made("labelled-residuals", {"": labelled_inputs(run)}, _VERSION, make)
    return torch.from_numpy(np.load(made[""].folder / "residuals.npy"))


def _ids(run: Run) -> list[list[int]]:
    """Token ids of every labelled text, task by task."""
    text, tokenizer = run.profile.text, load_tokenizer(run.profile)
    start = [] if text.bos == "none" else [tokenizer.bos_token_id]
    texts = [one for part, _ in labelled_texts().values() for one in part]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [start + one[len(start) - text.context_length :] for one in ids]
