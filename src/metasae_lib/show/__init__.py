"""Tables → figures and pages."""

from __future__ import annotations

from metasae_lib.show.examples import examples_page  # features with their strongest examples
from metasae_lib.show.published import (
    load_published,  # every value that the paper prints
    verdict,  # what ours says about one of them
    verdict_counts,  # how many of each
)
from metasae_lib.show.scorecard import (
    measured,  # what a run has for every published value
    paper_against_ours,  # the rows of one page
    run_scorecard,  # the paper's values beside a run's
    scorecard_rows,  # its rows as a reader sees them
    scorecard_sentence,  # how many can be judged
    table_1,  # the paper's Table 1 with ours
    tolerances,  # where tolerances come from
)
from metasae_lib.show.sentences import (
    ablation_sentence,  # which architecture reconstructs better
    conclusion,  # what 03 ends with
    elasticity_sentence,  # how far thresholds do
    fidelity_sentences,  # what the penalty costs
    flattening_sentence,  # whether the loss still moves
    ground_truth_sentences,  # what 06 ends with
    headline_choices,  # the headline under other choices, and how far they move it
    in_short,  # what the book's first page says
    judged_sentence,  # what the judge says of joint against solo
    makeup_sentence,  # whether a few dimensions make most of the residual
    probe_sentence,  # what probes say of joint against solo
    scale_of_run,  # a run's size against the paper's
    structure_sentence,  # what joint training does to pairs above chance
    welch_section,  # the paper's test, and why not
)
from metasae_lib.show.synthsaebench import (
    synthsaebench_pairs,  # what each method changes there
    synthsaebench_rows,  # ours beside the published values
    synthsaebench_sentences,  # whether the penalty recovers more atoms
)
from metasae_lib.show.tables import (
    ablation,  # configurations of the JumpReLU ablation
    beside_competitors,  # what the penalty and other methods change
    both_modes,  # fidelity at thresholds and in training form
    by_rarer,  # φ by the rarer feature of a pair
    compared_arms,  # solo and selected joint arm, first seed
    compared_scores,  # joint minus solo by a judge
    competitors,  # other ways to train
    controls,  # whether λ₂ = 0 is the solo arm
    downloads,  # the tables behind its figures
    explained,  # decoder variance explained post hoc
    finished_run,  # a run for reading: the kept one where none was made
    frontier_points,  # solo curves, joint arms and competitors over L2
    last_steps,  # each arm at the end of its training
    noise_floors,  # mean |φ| that chance alone gives
    open_run,  # the run that a notebook's parameters name
    paired_rows,  # measures of joint and frontier arms against solo
    paper_grid,  # the paper's Table 1 as points
    phi_rows,  # what a reader needs of it first
    phi_table,  # everything beside a mean |φ|
    provenance,  # where a page's numbers come from
    sentences_and_lists,  # explanations of both kinds, side by side
    time_spent,  # seconds by stage
)
from metasae_lib.show.text import (
    bullets,  # a section that is a list
    number,  # a number as a reader wants it
    percent,  # a change with its sign
    section,  # a short section of a page
    table,  # a numbered table
)
