"""Features → words and senses.

- `collect_contexts`: where every feature fires, and where it does not
- `fuzzing_score`: which text is real? -1 to 1
- `spearman_score`: rank correlation of strengths
- `detection_score`: does it fire here? 0 to 1
- `plan_of`: how much a profile asks
- `judge_of`: the judge that a profile names
- `in_words`: an explanation for a reader
- `score_pairs`: matched features scored by every judge
- `LexicalJudge`: the floor for every other judge
- `examine`: what a judge makes of right and wrong explanations
- `control_summary`: its controls as means with intervals
- `verdict_table`: whether it can be believed
- `first_line`: the same in words
- `matched_pairs`: features of two arms matched by cosine
- `kept_pairs`: how many pairs a cosine threshold keeps
- `choose_pairs`: those that are judged
- `compare_all`: joint minus solo by judge and score
- `figure_2`: the paper's Figure 2
- `pairs_needed`: pairs that would show a difference
- `published_values`: under the paper's ids
"""

from __future__ import annotations

from metasae_lib.interpret.comparison import (
    choose_pairs,
    compare_all,
    figure_2,
    kept_pairs,
    matched_pairs,
    pairs_needed,
    published_values,
)
from metasae_lib.interpret.contexts import collect_contexts
from metasae_lib.interpret.controls import control_summary, examine, first_line, verdict_table
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.scores import (
    detection_score,
    fuzzing_score,
    in_words,
    judge_of,
    plan_of,
    score_pairs,
    spearman_score,
)
