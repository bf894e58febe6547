"""Dictionaries → numbers.

- `calibrate`: thresholds of one dictionary under a rule
- `calibrate_arms`: thresholds of every arm of a run
- `CooccurrenceCounter`: exact counts of pairs
- `phi`: the coefficient of every pair (Eq. 1)
- `summarise`: mean |φ| over all pairs, beside its null
- `noise_floor`: mean |φ| of independent features
- `null_mean_abs`: the same at given firing rates
- `abs_phi_blocks`: |φ| by blocks of rows
- `enough_tokens`: whether a scan is long enough, in words
- `scan_arms`: counts of every arm of a run
- `cross_scan`: counts between dictionaries
- `partners`: who fires with whom, across dictionaries
- `top_matches`: the same for one pair of dictionaries
- `measure_arms`: L2, L0, CE and dead features of every arm
- `norms`: norms of the residuals, with and without position 0
- `sensitivity`: mean |φ| under every other choice
- `headline_by_choice`: joint against solo under each of them
- `bootstrap_mean_abs`: mean |φ| over resampled features
- `welch`: Welch's test as the paper has it
- `hungarian`: features matched by decoder cosine
"""

from __future__ import annotations

from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.cross import cross_scan, partners, top_matches
from metasae_lib.measure.fidelity import measure_arms, norms
from metasae_lib.measure.matching import hungarian
from metasae_lib.measure.phi import (
    abs_phi_blocks,
    enough_tokens,
    noise_floor,
    null_mean_abs,
    phi,
    summarise,
)
from metasae_lib.measure.scan import scan_arms
from metasae_lib.measure.sensitivity import headline_by_choice, sensitivity
from metasae_lib.measure.statistics import bootstrap_mean_abs, welch
from metasae_lib.measure.thresholds import calibrate, calibrate_arms
