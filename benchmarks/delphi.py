"""Delphi's detection and fuzzing prompts through our judge, beside our own, on the same features.

    make delphi PROFILE=tiny    # after the run has been trained (make book PROFILES=tiny)

Both are about the same examples under the same explanations: planted features with the right one
and with another's, and features of the solo arm. Delphi's fuzzing is not the paper's: which *marks*
in a text are right, asked of each text by itself. Its answers are scored as balanced accuracy.

Delphi asks for a list such as [1,0,0,1,1] about five texts. A server writes one, if it can. The
in-process judge chooses among all 32 by its usual rule: how much more probable the explanation
makes a list than "any text" in its place does. (Left to write, SmolLM2-135M wrote a list for less
than a sixth of the chats.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from metasae_lib import Profile, Run
from metasae_lib.interpret import controls, material
from metasae_lib.interpret import scores as scoring
from metasae_lib.interpret.contexts import collect_contexts
from metasae_lib.interpret.examples import QUANTILES, Example
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.questions import Question
from metasae_lib.study.arms import ArmSpec
from metasae_lib.train.training import load_arms


@dataclass(frozen=True)
class Chat(Question):
    """A chat that somebody else has written, answered in free text."""

    chat: str = "[]"

    @property
    def prompt(self) -> str:
        return self.chat

    @property
    def messages(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self.chat)
        return found


Chats = list[list[dict[str, str]]]


def said_to(answers: scoring.Answers, asked: Chats, unexplained: Chats) -> Sequence[str | None]:
    """What a judge writes."""
    return answers([Chat("explain", "", (), chat=json.dumps(chat)) for chat in asked])


class Chooser:
    """The in-process judge's model, choosing among all lists of five."""

    def __init__(self, judge: InProcessJudge) -> None:
        self._tokenizer, self._model = judge.tokenizer, judge.model
        self._lists = ["[" + ",".join(bits) + "]" for bits in itertools.product("01", repeat=5)]

    def __call__(self, asked: Chats, unexplained: Chats) -> list[str]:
        """The list that each chat's explanation speaks for most."""
        both = zip(asked, unexplained, strict=True)
        evidence = [self._log_p(chat) - self._log_p(plain) for chat, plain in both]
        return [self._lists[int(e.argmax())] for e in evidence]

    @torch.no_grad()
    def _log_p(self, chat: list[dict[str, str]]) -> torch.Tensor:
        """log p of each list after a chat, (32,)."""
        written = self._tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        ids, lists = (
            self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(
                self._model.device
            )
            for text in (written, self._lists)
        )
        read = self._model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        read.batch_repeat_interleave(len(lists))
        after = torch.cat([ids[:, -1:].expand(len(lists), 1), lists[:, :-1]], dim=1)
        logits = self._model(after, past_key_values=read).logits.double()
        return logits.log_softmax(-1).gather(2, lists[..., None]).sum((1, 2))


def delphi_records(
    made: Sequence[material.Material], explanations: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Features in the form that Delphi scores: the fields of its `LatentRecord`, as plain JSON.

    train and test are the examples of the explainer and of the questions, test by quintile, the
    weakest first; not_active those in which the feature is silent. tokens and activations, each
    (window,), become tensors in Delphi. Features without an explanation are left out.
    """

    def fields(example: Example) -> dict[str, Any]:
        return {
            "tokens": list(example.ids),
            "activations": list(map(float, example.acts)),
            "str_tokens": list(example.pieces),
        }

    return [
        {
            "latent": {"module_name": "metasae", "latent_index": one.feature},
            "explanation": explanation,
            "train": [fields(example) for example in one.explain.examples],
            "test": [
                fields(example) | {"quantile": QUANTILES * k // len(one.examples)}
                for k, example in enumerate(one.examples)
            ],
            "not_active": [fields(example) for example in one.silent],
        }
        for one, explanation in zip(made, explanations, strict=True)
        if explanation is not None
    ]


def delphi_scores(
    records: list[dict[str, Any]],
    answer: Callable[[Chats, Chats], Sequence[str | None]],
    python: str,
) -> pd.DataFrame:
    """Balanced accuracies of Delphi's two scorers, and the share of answers that it cannot read."""
    script = Path(__file__).with_name("peers") / "delphi_scores.py"

    def delphi(folder: Path, explained: bool) -> Chats:
        given = records if explained else [r | {"explanation": "any text"} for r in records]
        (folder / "records.json").write_text(json.dumps(given))
        subprocess.run([python, str(script), str(folder)], check=True)
        chats: Chats = json.loads((folder / "prompts.json").read_text())
        return chats

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unexplained, asked = delphi(folder, False), delphi(folder, True)
        said = answer(asked, unexplained)
        keys = [json.dumps(chat) for chat in asked]
        (folder / "answers.json").write_text(json.dumps(dict(zip(keys, said, strict=True))))
        delphi(folder, True)
        scores = json.loads((folder / "scores.json").read_text())
    frame = pd.DataFrame()
    for scorer, rows in scores.items():
        pairs = [tuple(zip(*row, strict=True)) for row in rows]
        frame[f"delphi {scorer}"] = [scoring.detection_score(said, true) for true, said in pairs]
        frame[f"unreadable {scorer}"] = [said.count(None) / len(said) for _, said in pairs]
    return frame.astype(float)


def main() -> None:
    """Score every group both ways and print the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--features", type=int, default=10, help="features of the solo arm")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--python", default=".venv-delphi/bin/python", help="of what has Delphi")
    options = parser.parse_args()
    run = Run.open(Profile.load(options.profile), options.runs)
    profile, sampling = run.profile, scoring.sampling_of(run.profile)
    name = ArmSpec("solo", profile.training.seeds[0]).name
    contexts = collect_contexts(run, {name: load_arms(run)[name]}, profile.autointerp.window)[name]
    judge = scoring.judge_of(profile)
    answers = scoring.answers_for(run, judge)
    answer = Chooser(judge) if isinstance(judge, InProcessJudge) else partial(said_to, answers)
    known = material.planted(contexts, sampling, copies=1)
    features = contexts.usable(sampling.examples, sampling.examples)[: options.features]
    own = material.materials(contexts, features, sampling)
    explanations = scoring.explanations_of(profile, judge, own, answers)
    explained = [(made, text) for made, text in zip(own, explanations, strict=True) if text]
    texts = [text for _, text in known]
    groups = {
        "planted, right": ([made for made, _ in known], texts),
        "planted, shuffled": ([made for made, _ in known], controls.shuffled(texts)),
        "features": ([made for made, _ in explained], [text for _, text in explained]),
    }
    frames = []
    for group, (made, given) in groups.items():
        ours = scoring.score(made, given, answers)
        theirs = delphi_scores(delphi_records(made, given), answer, options.python)
        frames.append(
            pd.concat([ours[["fuzzing", "detection"]], theirs], axis=1).assign(group=group)
        )
    both = pd.concat(frames)
    print(both.groupby("group", sort=False).mean().round(3).T.to_string())
    print(both.groupby("group", sort=False).size().rename("features").to_string())
    for theirs in ("delphi detection", "delphi fuzz"):
        for ours in ("detection", "fuzzing"):
            print(f"correlation of our {ours} with {theirs}: {both[ours].corr(both[theirs]):.2f}")


if __name__ == "__main__":
    main()
