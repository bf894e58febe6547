"""Dictionaries → numbers."""

from __future__ import annotations

from metasae_lib.measure.counting import (
    CooccurrenceCounter,  # exact counts of pairs
    Counts,  # counts within one dictionary
    CrossCounts,  # counts between two
)
from metasae_lib.measure.cross import (
    cross_scan,  # counts between dictionaries
    partners,  # who fires with whom, across dictionaries
    top_matches,  # the same for one pair of dictionaries
)
from metasae_lib.measure.exports import export_arms  # calibrated arms as SAELens reads them
from metasae_lib.measure.fidelity import (
    fidelity_pairs,  # what each setting costs against solo, on the same text
    measure_arms,  # L2, L0, CE and dead features of every arm
    norms,  # norms of the residuals, with and without position 0
)
from metasae_lib.measure.makeup import residual_makeup  # its largest dimensions, mean and norms
from metasae_lib.measure.matching import (
    hungarian,  # features matched by decoder cosine
    same_features,  # feature i against its start, its partner, other seeds
)
from metasae_lib.measure.pairs import (
    effects,  # the headline under each way to compare
    frontier_table,  # joint arms and competitors against the solo curve at their L2
    pair_table,  # every arm against the solo arm of its seed
    paired_measures,  # any measure of joint and frontier arms against solo
    resampled_mean_abs,  # mean |φ| of every arm in the same resamples of its features
    setting_table,  # pairs of each setting, for new seeds and features
)
from metasae_lib.measure.phi import (
    PhiSummary,  # φ over all pairs, without its matrix
    enough_tokens,  # whether a scan is long enough, in words
    noise_floor,  # mean |φ| of independent features
    null_mean_abs,  # the same at given firing rates
    phi,  # the coefficient of every pair (Eq. 1)
    summarise,  # mean |φ| over all pairs, beside its null
)
from metasae_lib.measure.probes import probe_arms  # labels told from a few features
from metasae_lib.measure.scan import scan_arms  # counts of every arm of a run
from metasae_lib.measure.sensitivity import (
    headline_by_choice,  # joint against solo under each of them
    sensitivity,  # mean |φ| under every other choice
)
from metasae_lib.measure.statistics import welch  # Welch's test as the paper has it
from metasae_lib.measure.structure import (
    links_table,  # features in clusters by the φ of a link
    shifted_counts,  # counts of pairs that look at different text
    structure,  # pairs above chance, and their clusters
    structure_table,  # how many, every arm
)
from metasae_lib.measure.thresholds import (
    calibrate,  # thresholds of one dictionary under a rule
    calibrate_arms,  # thresholds of every arm of a run
)
