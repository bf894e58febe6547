"""Tables → figures and pages.

- `number`: a number as a reader wants it
- `percent`: a change with its sign
- `section`: a short section of a page
- `table`: a numbered table
- `load_published`: every value that the paper prints
- `verdict`: what ours says about one of them
- `verdict_counts`: how many of each
- `open_run`: the run that a notebook's parameters name
- `compared_arms`: solo and selected joint arm, first seed
- `phi_table`: everything beside a mean |φ|
- `phi_rows`: what a reader needs of it first
- `grid_changes`: every arm against its solo arm
- `effects`: the headline under each way to compare
- `paper_grid`: the paper's Table 1 as points
- `by_rarer`: φ by the rarer feature of a pair
- `both_modes`: fidelity at thresholds and in training form
- `ablation`: configurations of the JumpReLU ablation
- `competitors`: other ways to train
- `explained`: decoder variance explained post hoc
- `flattening`: whether the loss still moves
- `time_spent`: seconds by stage
- `provenance`: where a page's numbers come from
- `downloads`: the tables behind its figures
- `scale_of_run`: a run's size against the paper's
- `fidelity_sentences`: what the penalty costs
- `ablation_sentence`: which architecture reconstructs better
- `spread_sentence`: how far choices move the headline
- `elasticity_sentence`: how far thresholds do
- `conclusion`: what 03 ends with
- `in_short`: what the book's first page says
- `measured`: what a run has for every published value
- `run_scorecard`: the paper's values beside a run's
- `scorecard_rows`: its rows as a reader sees them
- `scorecard_sentence`: how many can be judged
- `paper_against_ours`: the rows of one page
- `table_1`: the paper's Table 1 with ours
- `tolerances`: where tolerances come from
- `examples_page`: features with their strongest examples
"""

from __future__ import annotations

from metasae_lib.show.examples import examples_page
from metasae_lib.show.published import load_published, verdict, verdict_counts
from metasae_lib.show.scorecard import (
    measured,
    paper_against_ours,
    run_scorecard,
    scorecard_rows,
    scorecard_sentence,
    table_1,
    tolerances,
)
from metasae_lib.show.sentences import (
    ablation_sentence,
    conclusion,
    elasticity_sentence,
    fidelity_sentences,
    in_short,
    scale_of_run,
    spread_sentence,
)
from metasae_lib.show.tables import (
    ablation,
    both_modes,
    by_rarer,
    compared_arms,
    competitors,
    downloads,
    effects,
    explained,
    flattening,
    grid_changes,
    open_run,
    paper_grid,
    phi_rows,
    phi_table,
    provenance,
    time_spent,
)
from metasae_lib.show.text import number, percent, section, table
