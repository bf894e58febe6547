"""What notebooks show: the run they open, numbers and tables as text, conclusions as computed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

from metasae_lib import Profile, Run, measure
from metasae_lib.show import cases, scorecard, tables
from metasae_lib.show import sentences as wording
from metasae_lib.show import text as formats
from metasae_lib.show.published import RESULTS, load_published
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import ArtefactError, MeasureError, PublishedError

ROOT = Path(__file__).parents[1]
HEADLINE = "gpt2-large.table1.lambda0.3-sigma1.d_mean_abs_phi_pct"


def fill(run: Run) -> Run:
    """Give a run the tables that 02 and 03 save, made up so that answers are known."""
    arms = pd.DataFrame(
        [
            ("solo-seed0", "solo", 0, None, None, 0.100, 2.0, 0.08, 3),
            ("solo-seed1", "solo", 1, None, None, 0.101, 2.1, 0.08, 2),
            ("joint-lambda0.3-sigma1-seed0", "joint", 0, 0.3, 1.0, 0.110, 2.6, 0.10, 1),
            ("joint-lambda0.3-sigma1-seed1", "joint", 1, 0.3, 1.0, 0.111, 2.7, 0.10, 0),
            ("control-sigma1-seed0", "control", 0, 0.0, 1.0, 0.100, 2.0, 0.08, 3),
        ],
        columns=["arm", "kind", "seed", "lambda2", "sigma_sq", "l2", "ce_overhead_pct",
                 "ce_overhead_nats", "dead"],
    ).assign(ce_baseline=4.0)  # fmt: skip
    phi = arms[["arm", "kind", "seed", "lambda2", "sigma_sq"]].assign(
        mean_abs=[2.00e-3, 2.02e-3, 1.90e-3, 1.91e-3, 2.00e-3], null_mean_abs=1e-3,
        noise_floor=8e-4, k=None,
        low=1.8e-3, high=2.1e-3, n_pairs=100, share_negative=0.7, median=-1e-4, maximum=0.2,
        alive=run.profile.dictionary.n_features,
    )  # fmt: skip
    draws = np.random.default_rng(0).normal(0, 1e-5, (5, 400))
    replicates = {arm: m + d for arm, m, d in zip(phi.arm, phi.mean_abs, draws, strict=True)}
    pairs = measure.pair_table(run, phi, arms, replicates)
    grid = measure.setting_table(pairs)
    frontier = measure.frontier_table(run, phi, arms, replicates)
    run.save_table("arms", arms, "made up")
    run.save_table("phi", phi, "made up")
    run.save_table("grid", grid, "made up")
    run.save_table("effects", measure.effects(phi, pairs, frontier), "made up")
    run.save_table("control", pd.DataFrame({"bit_for_bit": [True]}), "made up")
    return run


@pytest.fixture
def full(run: Run) -> Run:
    """A run of `tiny` with made-up tables."""
    return fill(run)


@pytest.mark.parametrize("place", ["", "notebooks", "src/metasae_lib"])
def test_a_relative_runs_dir_means_the_same_everywhere(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []
    monkeypatch.chdir(ROOT / place)
    monkeypatch.setattr(Run, "open", lambda profile, runs_dir: opened.append(runs_dir))
    tables.open_run("tiny", {}, "../runs")
    tables.open_run("tiny", {}, str(tmp_path))
    assert opened == [ROOT / "runs", tmp_path]


def test_overrides_reach_the_run(tmp_path: Path) -> None:
    run = tables.open_run("tiny", {"training.lambda2": [0.5]}, str(tmp_path))
    assert run.name == f"tiny-{Profile.load('tiny', {'training.lambda2': [0.5]}).overrides_hash}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3, "0.3"), (1.0, "1"), (-7.5, "−7.5"), (0.09701, "0.097"), (2.27e-3, "2.27e−3"),
        (5e-16, "5e−16"), (209e6, "209,000,000"), (1234.5, "1,234"), (51.62, "51.6"), (0, "0"),
        (None, "—"), (math.nan, "—"), ("Adam", "Adam"), (True, "yes"), (np.bool_(False), "no"),
        (math.inf, "∞"), (np.int64(12), "12"), (np.float32(0.5), "0.5"), (999.7, "1,000"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(180.3, "180"), (-99.6, "−100"), (99.4, "99")])
def test_numbers_of_two_digits(value: float, text: str) -> None:
    assert formats.number(value, 2) == text


def test_tables_are_numbered_and_keep_their_bars() -> None:
    text = formats.table(pd.DataFrame({"mean |φ|": [0.5], "b": ["x|y"]}), "A caption", "tab-a").data
    lines = text.splitlines()
    assert lines[:3] == [":::{table} A caption", ":name: tab-a", ""]
    assert lines[3:6] == ["| mean \\|φ\\| | b |", "| --- | --- |", "| 0.5 | x\\|y |"]
    assert lines[6] == ":::"


@pytest.mark.parametrize("end", ["\r", "\r\n", "\u2028", "\x85", "\v", "\f", "\x1c", "\0"])
def test_no_cell_ends_its_row(end: str) -> None:
    frame = pd.DataFrame({"x": [f"a{end}b", f"{end}c", f"d{end}"]})
    rows = formats.table(frame, "A caption", "tab-a").data.splitlines()[5:-1]
    assert len(rows) == len(frame)


@settings(deadline=None)
@given(st.text(st.one_of(st.sampled_from("\\`*_{}[]<>()#+-.!|$~:%=&^ \n1a"), st.characters())))
def test_what_someone_wrote_is_shown_letter_by_letter(written: str) -> None:
    """By the parser of the book's pages."""
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["parse"]
    parser = create_md_parser(
        MdParserConfig(enable_extensions=extensions["myst_enable_extensions"]), RendererHTML
    )
    said = " ".join(written.split()).replace("\0", "\ufffd")
    shown = parser.render(formats.literal(written)).strip()
    assert shown == (f"<p>{escapeHtml(said)}</p>" if said else "")


def test_reading_never_claims_more_than_the_interval() -> None:
    assert "rises" in wording.reading(1.0, 3.0, -7.5)
    assert "direction" in wording.reading(-9.0, -5.0, -7.5)
    assert "lies within" in wording.reading(-9.0, -5.0, -7.5)
    assert "not the size" in wording.reading(-3.0, -1.0, -7.5)
    assert "cannot tell" in wording.reading(-3.0, 2.0, -7.5)
    assert "excludes the paper" in wording.reading(-3.0, 2.0, -7.5)
    assert "does not exclude" in wording.reading(-9.0, 2.0, -7.5)


def test_an_empty_run_says_why_nothing_is_there(run: Run) -> None:
    card = scorecard.run_scorecard(run).set_index("id")
    assert len(card) == len(load_published().values)
    results = card[card.section.isin(["result", "table 1", "case study"])]
    assert set(results.group) == {"not run", "not printed"}
    assert (card.verdict.str.len() > len("not run: ")).all()
    assert card.loc["gpt2-large.setup.optimizer", "verdict"] == "as in the paper"
    assert card.loc["gpt2-large.setup.k", "ours"] == run.profile.dictionary.k
    assert "single features" in card.loc["gpt2-large.case.too.solo-2827.fuzz", "verdict"]
    assert "05_case_studies" in card.loc["gpt2-large.case.too.joint-4741.phi", "verdict"]
    found = scorecard.tolerances(scorecard.run_scorecard(run)).set_index(
        "where the tolerance comes from"
    )
    scatter = found.loc["twice the scatter of a difference of two of its four seeds (§5.1)"]
    assert scatter.tolist() == [9, "1.3", "1.3"]  # nine settings; 2 √2 · 1e-5 / 2.15e-3 is 1.32%
    sentences = wording.in_short(run, scorecard.run_scorecard(run))["sentences"]
    assert "small run" in sentences[0] and "**0**" in sentences[-1]


def test_a_later_table_says_how_many_seeds_would_tell(run: Run) -> None:
    delta = "gpt2-large.fuzz_paired_delta"  # 0.0175 ± 0.0043 in the paper
    row = {"id": delta, "value": 0.029, "low": 0.0156, "high": 0.0424, "words": ""}
    run.save_table("autointerp_values", pd.DataFrame([row]), "made up, as of an older run")
    assert math.isnan(scorecard.run_scorecard(run).set_index("id").seeds[delta])
    run.save_table("autointerp_values", pd.DataFrame([row | {"scatter": 0.0128}]), "made up")
    # With n seeds: ± t(n-1) · 0.0128 / √n; 0.0074 at 14 reaches 0.0218, 0.0071 at 15 does not.
    assert scorecard.run_scorecard(run).set_index("id").seeds[delta] == 15


def test_scorecard_of_a_run_with_results(full: Run) -> None:
    card = scorecard.run_scorecard(full).set_index("id")
    changes = [100 * (1.90 / 2.00 - 1), 100 * (1.91 / 2.02 - 1)]  # pair by pair
    expected = scipy.stats.t.interval(0.95, 1, np.mean(changes), scipy.stats.sem(changes))
    ours = card.loc[HEADLINE]
    assert (ours.ours, ours.low, ours.high) == pytest.approx((np.mean(changes), *expected))
    assert ours.group == "inconclusive"  # reaches the paper's -7.5 ± 1.3
    # With n seeds: ± t(n-1) · 0.314 / √n, clear of -6.2 for the first time at 3.
    assert ours.seeds == 3
    assert (
        "(3 seeds would tell)"
        in scorecard.scorecard_rows(card.reset_index()).verdict.to_list()[
            list(card.index).index(HEADLINE)
        ]
    )
    l2 = card.loc["gpt2-large.table1.lambda0.3-sigma1.d_l2_pct", "ours"]
    assert l2 == pytest.approx(50 * (0.110 / 0.100 + 0.111 / 0.101 - 2))
    assert card.loc["gpt2-large.joint_minus_solo_ce_points", "ours"] == pytest.approx(0.6)
    assert card.loc["gpt2-large.joint_minus_solo_ce_points", "verdict"] == "agrees"
    assert card.loc["gpt2-large.lambda0_control", "verdict"] == "agrees"
    assert card.loc["gpt2-large.solo_l2", "group"] == "other model: not comparable"
    assert card.loc["gemma-2-9b.selected", "verdict"].startswith("not run: this profile trains one")
    assert "grid" in card.loc["gpt2-large.table1.lambda1-sigma3.d_l2_pct", "verdict"]
    assert card.loc["artefact.figure-1b", "verdict"] == "made"


def test_effects_and_conclusion(full: Run) -> None:
    first, second = wording.conclusion(full)
    assert "−5.2%" in first and "new seeds and features, 2 pairs" in first
    assert second.startswith("So ")
    effects = full.load_table("effects")
    curve = effects[effects.way == "seeds"].assign(way="frontier", change_pct=-1.0, low=-2, high=1)
    full.save_table("effects", pd.concat([effects, curve]), "with a solo frontier")
    assert "cannot tell the penalty from worse" in wording.conclusion(full)[2]
    for low, high, words in ((-2.0, -0.5, "does not explain"), (0.5, 2.0, "lowers mean |φ| more")):
        assert words in wording.at_equal_l2({"change_pct": -1.0, "low": low, "high": high})
    alone = effects[effects.way == "features"].head(1)
    full.save_table("effects", alone, "one pair")
    assert "new features, one pair" in wording.conclusion(full)[0]
    headline = wording.in_short(full, scorecard.run_scorecard(full))
    assert any("bit for bit" in sentence for sentence in headline["sentences"])
    assert sum(headline["verdicts"].values()) == len(load_published().values)


def test_collapsed_dictionaries_judge_nothing(full: Run) -> None:
    assert scorecard.collapsed(full) == ""
    phi = full.load_table("phi")
    n = full.profile.dictionary.n_features
    other = phi.iloc[[0]].assign(arm="jumprelu-k16-seed0", kind="jumprelu", alive=1)
    full.save_table("phi", pd.concat([phi, other]), "only the ablation mostly dead")
    assert scorecard.collapsed(full) == ""
    full.save_table("phi", other, "an arm that no result compares, alone")
    assert scorecard.collapsed(full) == ""
    phi.loc[0, "alive"] = n // 2 - 1
    full.save_table("phi", phi, "one arm mostly dead")
    assert f"only {n // 2 - 1}" in scorecard.collapsed(full)
    assert wording.conclusion(full)[1].startswith("But of 256 features only")
    card = scorecard.run_scorecard(full)
    results = card[card.section.isin(RESULTS)]
    assert set(results.group) <= {"not run", "not printed"}
    assert f"only {n // 2 - 1}" in results.verdict[results.group == "not run"].iloc[0]


def test_table_1_has_a_row_for_each_setting(full: Run) -> None:
    rows = scorecard.table_1(full).data.splitlines()[5:-1]
    assert len(rows) == 9
    assert "−7.5" in rows[4] and "−5.22 (" in rows[4]


def test_the_three_blocks(full: Run) -> None:
    shown = scorecard.paper_against_ours(full, "*.solo_l2", label="tab-x").data
    assert shown.startswith("## Paper against ours\n") and "0.097" in shown
    assert tables.provenance(full).data.startswith("## Provenance\n")
    links = tables.downloads(full, "arms").data
    assert links.startswith("## Downloads\n") and "/tables/arms.csv): arm, kind" in links
    with pytest.raises(PublishedError, match="matches"):
        scorecard.paper_against_ours(full, "*.nothing", label="tab-x")
    with pytest.raises(ArtefactError, match="no table 'nothing'"):
        tables.downloads(full, "nothing")


def test_a_profile_without_both_arms_cannot_be_compared(tmp_path: Path) -> None:
    run = tables.open_run("tiny", {"training.arms": ["solo"]}, str(tmp_path))
    with pytest.raises(MeasureError, match="no joint arm"):
        tables.compared_arms(run)


def test_pairs_by_their_rarer_feature() -> None:
    by_rate = pd.DataFrame(
        {"group_a": [0, 0, 1], "group_b": [0, 1, 1], "rate_a": [0.1, 0.1, 0.2],
         "n_pairs": [1, 3, 2], "mean_abs": [4.0, 8.0, 5.0], "null_mean_abs": [1.0, 1.0, 2.0]}
    )  # fmt: skip
    found = tables.by_rarer(by_rate)
    assert list(found.mean_abs) == [7.0, 5.0]
    assert list(found.rate) == [0.1, 0.2]


def test_flattening_compares_the_last_two_tenths() -> None:
    history = pd.DataFrame({"arm": "a", "step": range(10, 110, 10), "l2": 1.0})
    history.loc[history.step == 100, "l2"] = 0.99
    assert tables.flattening(history)["a"] == pytest.approx(-1.0)


def test_ablation_takes_the_first_seed_and_the_selected_penalty(run: Run) -> None:
    rows = [
        ("solo", 0, None, None, None, 0.20), ("solo", 1, None, None, None, 0.9),
        ("joint", 0, 0.3, 1.0, None, 0.21), ("joint", 0, 0.1, 1.0, None, 0.9),
        ("jumprelu", 0, None, None, None, 0.19), ("jumprelu", 0, 0.3, 1.0, None, 0.25),
        ("batchtopk", 0, None, None, 4, 0.3), ("ortsae", 0, None, None, None, 0.2),
    ]  # fmt: skip
    arms = pd.DataFrame(rows, columns=["kind", "seed", "lambda2", "sigma_sq", "k", "l2"]).assign(
        arm=lambda frame: frame.index.astype(str), l0_threshold=8.0, ce_overhead_pct=1.0, dead=0
    )
    frame = tables.ablation(run, arms)
    assert frame.arm.tolist() == ["0", "2", "4", "5", "6"]
    assert frame.architecture.tolist() == ["BatchTopK"] * 2 + ["JumpReLU"] * 2 + ["BatchTopK"]
    assert frame.k.tolist() == [8, 8, 8, 8, 4]
    # Solo: 0.19 against 0.20; joint: 0.25 against 0.21. k = 4 has no JumpReLU to compare with.
    assert "Of the 2 of 2 conditions" in wording.ablation_sentence(frame)
    assert "lower L2 in 1 (" in wording.ablation_sentence(frame)
    # With more active features a lower L2 proves nothing.
    denser = frame.assign(l0=frame.l0.where(frame.arm != "4", 16.0))
    assert "Of the 1 of 2 conditions" in wording.ablation_sentence(denser)
    denser = frame.assign(l0=frame.l0.where(frame.architecture != "JumpReLU", 16.0))
    assert "cannot be compared" in wording.ablation_sentence(denser)
    assert "no JumpReLU arm" in wording.ablation_sentence(frame[frame.architecture != "JumpReLU"])


def test_the_penalty_stands_beside_its_competitors(run: Run) -> None:
    rows = [
        (ArmSpec("solo", 0), 2.0e-3, 0.100, 2.0, 60), (ArmSpec("solo", 1), 2.0e-3, 0.100, 2.0, 64),
        (ArmSpec("frontier", 0, k=6), 1.8e-3, 0.120, 3.0, 60),
        (ArmSpec("joint", 0, 0.3, 1.0), 1.9e-3, 0.110, 2.5, 61),
        (ArmSpec("joint", 0, 0.1, 1.0), 1.9e-3, 0.110, 2.5, 61),
        (ArmSpec("ortsae", 0), 1.5e-3, 0.130, 3.0, 62),
        (ArmSpec("matryoshka", 0), 1.5e-3, 0.115, 3.0, 50),
    ]  # fmt: skip
    phi = pd.DataFrame(
        [{"arm": spec.name, **vars(spec), "mean_abs": mean, "null_mean_abs": 1e-3, "alive": alive}
         for spec, mean, _, _, alive in rows]
    )  # fmt: skip
    arms = pd.DataFrame(
        [(spec.name, l2, ce) for spec, _, l2, ce, _ in rows],
        columns=["arm", "l2", "ce_overhead_pct"],
    )
    draws = {arm: mean + np.zeros(5) for arm, mean in zip(phi.arm, phi.mean_abs, strict=True)}

    def shown(phi: pd.DataFrame) -> str:
        grid = measure.setting_table(measure.pair_table(run, phi, arms, draws))
        text = tables.beside_competitors(phi, grid, measure.frontier_table(run, phi, arms, draws))
        return text.data  # type: ignore[no-any-return]

    lines = shown(phi).splitlines()
    cells = {
        line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines if "seed" not in line
    }
    assert {"joint-lambda0.3-sigma1", "ortsae", "matryoshka"} == {
        name for name in cells if name in {row[0].name.rsplit("-", 1)[0] for row in rows}
    }
    # At L2 0.115 the curve is at 1.85e-3; OrtSAE lies beyond its end.
    equal = f"{100 * (1.5 / 1.85 - 1):+.1f}%".replace("-", "−")
    assert cells["matryoshka"] == [
        "1", "−25.0% (−25.0% to −25.0%)", "−50.0%", "+15.0%", "+1.0",
        f"{equal} ({equal} to {equal})", "−41.2%", "50", "60 |",
    ]  # fmt: skip
    assert cells["ortsae"][5:7] == ["—", "—"]
    assert "trains no competitor" in shown(phi[:5])


def test_controls_are_held_against_the_solo_arm_of_their_seed() -> None:
    def arm(kind: str, seed: int, shift: float = 0.0) -> Any:
        weights = {w: torch.full((2, 3), float(seed)) for w in ("W_enc", "W_dec", "b_dec")}
        weights["b_dec"] = weights["b_dec"] + shift
        return Fake(spec=Fake(kind=kind, seed=seed), sae=Fake(**weights))

    arms = {"solo-seed0": arm("solo", 0), "a": arm("control", 0, 0.5), "b": arm("control", 1)}
    found = tables.controls(arms)
    assert found.to_dict("list") == {
        "control": ["a"], "solo": ["solo-seed0"], "largest_difference": [0.5],
        "bit_for_bit": [True],
    }  # fmt: skip


def test_noise_floors() -> None:
    frame = tables.noise_floors({"short": 1_000, "long": 1_000_000}, 0.01)
    assert frame.tokens.tolist() == [1_000, 1_000_000]
    floors = [math.sqrt(2 / (math.pi * n)) for n in frame.tokens]
    assert frame["noise floor √(2/(πN))"].tolist() == pytest.approx(floors)
    independent = frame["independent at the paper's mean rate"]
    assert independent[1] == pytest.approx(floors[1], rel=0.01)


def test_ground_truth_sentences_say_what_was_recovered() -> None:
    scores = pd.DataFrame(
        {"lambda2": [0.0, 0.0, 0.1, 0.1, 0.3, 0.3], "recovered": [0.5, 0.52, 0.9, 0.9, 0.3, 0.3],
         "mean_abs_phi": [3.0, 3.0, 4.0, 4.0, 2.0, 2.0]}
    )  # fmt: skip
    first, second, third, fourth = wording.ground_truth_sentences(scores)
    assert "λ₂ = 0.1" in first and "90% of the atoms, solo training 51%" in first
    assert first.endswith("that is more.")
    assert second == "At λ₂ = 0.3, the largest here, it recovers 30%."
    assert third.endswith("λ₂ = 0.3.") and "+0.9" in fourth
    even = wording.ground_truth_sentences(scores.assign(recovered=[0.4, 0.6, 0.5, 0.5, 0.5, 0.5]))
    assert "no clear difference" in even[0] and even[2].endswith("none.")


def test_sense_sentence_counts_words() -> None:
    info = pd.DataFrame(
        {"word": ["a", "a", "b", "b"], "kind": ["solo", "joint"] * 2, "share": [0.1, 0.4, 0.2, 0.5]}
    )
    found = cases.sense_sentence(info)
    assert "for 2 of 2 words" in found and "+0.300" in found and found.endswith(": a difference.")
    assert "frequent enough" in cases.sense_sentence(info[:0])


def test_the_paper_s_joint_features_of_a_word_overlap() -> None:
    printed = cases.printed_partners()
    assert set(printed.word) == {"too", "let", "cookies", "flash"}
    implied = cases.implied_overlap(printed)
    sizes = printed.groupby("word").size()
    assert len(implied) == (sizes * (sizes - 1) // 2).sum()
    one = implied.iloc[0]
    angles = math.acos(one["φ"]) + math.acos(one["φ "])  # the law of cosines on a sphere
    assert one["least φ of the two"] == pytest.approx(math.cos(angles))
    study = pd.DataFrame({"phi": [math.nan, 0.5, 0.4]})
    values = cases.case_values(printed, [cases.WordStudy("too", 2, "", study)])
    found = values.set_index("id").value.dropna()
    strongest = printed[printed.word == "too"].set_index("id").value.idxmax()
    assert found[strongest] == 0.5 and sorted(found) == [0.4, 0.5]


def test_explanations_prefer_the_language_model(full: Run) -> None:
    assert cases.explanations(full).empty
    scores = pd.DataFrame(
        {"judge": ["lexical", "model", "lexical"],
         "arm": ["solo-seed0", "solo-seed0", "joint-lambda0.3-sigma1-seed0"],
         "feature": [1, 1, 2], "explanation": ["a", "b", "c"], "fuzzing": [0.1, 0.2, 0.3]}
    )  # fmt: skip
    full.save_table("autointerp_scores", scores, "made up")
    found = cases.explanations(full).set_index("feature")
    assert found.fuzz.to_dict() == {1: 0.2, 2: 0.3}
    assert found.arm.to_dict() == {1: "solo-seed0", 2: "joint-lambda0.3-sigma1-seed0"}


def test_the_judges_result_is_said_with_its_interval() -> None:
    row = {"judge": "embedding", "against": "solo", "pairs": "matched", "score": "fuzzing",
           "n": 8000, "n_seeds": 4, "delta": 0.02, "low": 0.01, "high": 0.03,
           "over": "seeds and features"}  # fmt: skip
    other = {"against": "frontier", "delta": -0.01, "low": -0.03}
    compared = pd.DataFrame([row, row | other, row | {"pairs": "random", "delta": 9.0}])
    said = wording.judged_sentence(compared, "embedding").data
    assert "solo arm **+0.0200** (+0.0100 to +0.0300" in said and "differs from zero" in said
    assert "nearest L2 **−0.0100** (−0.0300 to +0.0300" in said and "holds zero" in said
    assert "9.0" not in said
    assert "no result" in wording.judged_sentence(compared, "http").data
