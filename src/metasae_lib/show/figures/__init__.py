"""Each figure of the book as one function of a result table: data frame in, matplotlib Figure out.

Figures are made without pyplot, so none stays open. All share one style: Okabe and Ito's colours
(told apart by every kind of colour vision), a shape beside every colour, white ground, text of at
least 9 points.
"""

from __future__ import annotations

from metasae_lib.show.figures.cooccurrence import (
    HEADLINE,
    activation_norms,
    against_chance,
    clustered,
    density_difference,
    effect,
    elasticity,
    firing_rates,
    frontier,
    pareto_front,
    phi_distribution,
    threshold_calibration,
    trade_off,
)
from metasae_lib.show.figures.interpretation import (
    cluster,
    fuzzing_difference,
    judge_controls,
    probes,
    scorecard_overview,
    scores_together,
    sense_information,
    split_counts,
)
from metasae_lib.show.figures.style import KINDS
from metasae_lib.show.figures.training import (
    ablation,
    escape,
    fidelity,
    fidelity_pairs,
    losses,
    makeup,
    penalty_profile,
    phi_against_recovery,
    push_2d,
    push_3d,
    recovery,
    recovery_at_l2,
    same_features,
    time_spent,
    training_curve,
)
