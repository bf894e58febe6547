"""Every judge on the same planted controls: what it can tell, and how fast.

    make bench BENCH=judges            # lexical, embedding, and SmolLM2 by log-probabilities
    .venv/bin/python benchmarks/judges.py embedding qwen2.5-coder-0.5b

Planted concepts of meaning and of form in the text of the default profile, explained by a token
list, by their names, by a near miss, or wrongly. Nothing of a dictionary is looked at, so the
choice of a judge cannot favour one. Prints fuzzing, Spearman and detection of each, and features a
second, from texts that were not asked about before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd

from metasae_lib import Profile, Run
from metasae_lib.interpret import LexicalJudge, collect_contexts
from metasae_lib.interpret.controls import Group, control_table, planted_groups
from metasae_lib.interpret.judges.embedding import EmbeddingJudge
from metasae_lib.interpret.judges.in_process import InProcessJudge
from metasae_lib.interpret.judges.questions import Judge
from metasae_lib.interpret.material import planted
from metasae_lib.interpret.scores import SCORES, answers_of, explain, sampling_of, token_lists
from metasae_lib.train import train_arms

# One arm that is hardly trained: contexts are collected for an arm, and none of it is used.
OVERRIDES = {
    "training.arms": ["solo"], "training.seeds": [0], "training.train_tokens": 1024,
    "training.meta_posthoc": [], "text.roles.train": 1024,
}  # fmt: skip


def main() -> None:
    run = Run.open(Profile.load("smollm2-135m", OVERRIDES), Path("_build/judges"))
    (contexts,) = collect_contexts(run, train_arms(run), run.profile.autointerp.window).values()
    known = planted(contexts, sampling_of(run.profile), copies=3)
    texts = [one.text for one in contexts.sample(200)]
    made, rows = [one.material for one in known], []
    for name in sys.argv[1:] or ["lexical", "embedding", "smollm2-135m"]:
        judge: Judge = LexicalJudge()
        if name == "embedding":
            judge = EmbeddingJudge("embedded:all-minilm-l6-v2", texts)
        elif name != "lexical":
            judge = InProcessJudge(f"embedded:{name}")
        right = explain(made, answers_of(judge)) if name == "lexical" else token_lists(made)
        for kind, group in planted_groups(known, right).items():
            for condition, explanations in group.given.items():
                started = time.perf_counter()
                one = {kind: Group(group.made, {condition: explanations})}
                found = control_table(one, answers_of(judge))
                row = {"judge": name, "on": kind, "explanation": condition, "n": len(found)}
                row |= {score: found[score].mean() for score in SCORES}
                row["features/s"] = len(found) / (time.perf_counter() - started)
                rows.append(row)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
