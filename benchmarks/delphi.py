"""Delphi's detection and fuzzing prompts through our judge, beside our own, on the same features.

    make delphi PROFILE=tiny    # after the run has been trained (make book PROFILES=tiny)

Both are about the same examples under the same explanations: planted features with the right one
and with another's, and features of the solo arm. Delphi's fuzzing is not the paper's: which *marks*
in a text are right, asked of each text by itself. Its answers are scored as balanced accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from metasae_lib import Profile, Run
from metasae_lib import autointerp as ai
from metasae_lib.contexts import collect
from metasae_lib.judges import Question
from metasae_lib.profile import ArmSpec
from metasae_lib.training import load_arms


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


def delphi_scores(records: list[dict[str, Any]], answers: ai.Answers, python: str) -> pd.DataFrame:
    """Balanced accuracies of Delphi's two scorers, and the share of answers that it cannot read."""
    script = Path(__file__).with_name("peers") / "delphi_scores.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "records.json").write_text(json.dumps(records))
        subprocess.run([python, str(script), name], check=True)
        chats = [json.dumps(chat) for chat in json.loads((folder / "prompts.json").read_text())]
        said = answers([Chat("explain", "", (), chat=chat) for chat in chats])
        (folder / "answers.json").write_text(json.dumps(dict(zip(chats, said, strict=True))))
        subprocess.run([python, str(script), name], check=True)
        scores = json.loads((folder / "scores.json").read_text())
    frame = pd.DataFrame()
    for scorer, rows in scores.items():
        pairs = [tuple(zip(*row, strict=True)) for row in rows]
        frame[f"delphi {scorer}"] = [ai.detection_score(said, true) for true, said in pairs]
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
    profile, plan = run.profile, ai.plan_of(run.profile)
    name = ArmSpec("solo", profile.training.seeds[0]).name
    contexts = collect(run, {name: load_arms(run)[name]}, profile.autointerp.window)[name]
    judge = ai.judge_of(profile)
    answers = ai.answers_for(run, judge)
    known = ai.planted(contexts, plan, copies=1)
    features = contexts.usable(plan.examples, plan.examples)[: options.features]
    own = ai.materials(contexts, features, plan)
    explanations = ai.explanations_of(profile, judge, own, answers)
    explained = [(made, text) for made, text in zip(own, explanations, strict=True) if text]
    texts = [text for _, text in known]
    groups = {
        "planted, right": ([made for made, _ in known], texts),
        "planted, shuffled": ([made for made, _ in known], ai.shuffled(texts)),
        "features": ([made for made, _ in explained], [text for _, text in explained]),
    }
    frames = []
    for group, (made, given) in groups.items():
        ours = ai.score(made, given, answers)
        theirs = delphi_scores(ai.delphi_records(made, given), answers, options.python)
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
