"""Delphi's detection and fuzzing scorers with somebody else's answers; in Delphi's environment.

    python delphi_scores.py FOLDER

Reads FOLDER/records.json (`autointerp.delphi_records`) and FOLDER/answers.json (prompt to answer,
where there is one), and writes FOLDER/prompts.json, every chat that Delphi asks, and
FOLDER/scores.json: for each scorer and record, what is (activating) and what was said (or null).
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Delphi imports vLLM for a client of its own, which is not used here.
for name in ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs"):
    module = ModuleType(name)
    module.__getattr__ = lambda name: None  # type: ignore[method-assign]
    sys.modules[name] = module

from delphi.clients.client import Client, Response  # noqa: E402
from delphi.latents.latents import (  # noqa: E402
    ActivatingExample,
    Latent,
    LatentRecord,
    NonActivatingExample,
)
from delphi.scorers import DetectionScorer, FuzzingScorer  # noqa: E402

SHOWN = 5  # examples in one prompt, Delphi's usual number


class Told(Client):
    """Answers from a table, and keeps what was asked."""

    def __init__(self, answers: dict[str, str | None]) -> None:
        super().__init__("told")
        self.answers = answers
        self.asked: list[list[dict[str, str]]] = []

    async def generate(self, prompt: Any, **kwargs: Any) -> Response:
        self.asked.append(prompt)
        return Response(text=self.answers.get(json.dumps(prompt)) or "")


def record_of(fields: dict[str, Any]) -> LatentRecord:
    """A record as Delphi has it."""

    def examples(kind: type, rows: list[dict[str, Any]]) -> list[Any]:
        tensors = ("tokens", "activations")
        return [
            kind(**{k: torch.tensor(v) if k in tensors else v for k, v in row.items()})
            for row in rows
        ]

    return LatentRecord(
        Latent(**fields["latent"]),
        train=examples(ActivatingExample, fields["train"]),
        test=examples(ActivatingExample, fields["test"]),
        not_active=examples(NonActivatingExample, fields["not_active"]),
        explanation=fields["explanation"],
    )


def main(folder: Path) -> None:
    """Ask and score."""
    logging.disable(logging.CRITICAL)  # what cannot be read is counted, not logged
    records = json.loads((folder / "records.json").read_text())
    path = folder / "answers.json"
    client = Told(json.loads(path.read_text()) if path.exists() else {})
    scores = {}
    for scorer_of in (DetectionScorer, FuzzingScorer):
        scorer = scorer_of(client, n_examples_shown=SHOWN)
        scores[scorer.name] = [
            [(one.activating, one.prediction) for one in scorer.call_sync(record_of(r)).score]
            for r in records
        ]
    (folder / "prompts.json").write_text(json.dumps(client.asked))
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
