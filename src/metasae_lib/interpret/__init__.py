"""Features → words and senses."""

from __future__ import annotations

from metasae_lib.interpret.comparison import (
    choose_pairs,  # those that are judged
    compare_all,  # joint minus solo by judge and score
    figure_2,  # the paper's Figure 2
    kept_pairs,  # how many pairs a cosine threshold keeps
    matched_pairs,  # features of two arms matched by cosine
    pairs_needed,  # pairs that would show a difference
    published_values,  # under the paper's ids
    rivals,  # what the joint arm of every seed is held against
)
from metasae_lib.interpret.contexts import (
    Contexts,  # one arm's stretches of text
    collect_contexts,  # where a feature fires, and not
)
from metasae_lib.interpret.controls import (
    control_summary,  # its controls as means with intervals
    examine,  # what a judge makes of right and wrong explanations
    fineness,  # how fine a difference it sees
    first_lines,  # the same in words
    is_able,  # the verdict on one score
    verdict_table,  # whether it can be believed
)
from metasae_lib.interpret.examples import Example  # a window of tokens with its activations
from metasae_lib.interpret.judges.lexical import LexicalJudge  # the floor for every other judge
from metasae_lib.interpret.lens import (
    Lens,  # the tokens that each feature of one arm promotes and suppresses
    logit_lens,  # of several arms
)
from metasae_lib.interpret.scores import (
    against_lists,  # sentences and token lists of the same features
    detection_score,  # does it fire here? 0 to 1
    fuzzing_score,  # which text is real? -1 to 1
    in_words,  # an explanation for a reader
    judge_of,  # the judge that a profile names
    sampling_of,  # what a profile asks about each feature
    score_pairs,  # matched features scored by every judge
    spearman_score,  # rank correlation of strengths
)
