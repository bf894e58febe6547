"""Scores by hand and against SciPy, material against its promises, controls with judges we know."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from metasae_lib import show
from metasae_lib.interpret import comparison, controls
from metasae_lib.interpret import scores as scoring
from metasae_lib.interpret.examples import Example
from metasae_lib.interpret.judges.lexical import LexicalJudge
from metasae_lib.interpret.judges.questions import Question
from metasae_lib.interpret.material import (
    PLANTED,
    Marginal,
    Material,
    Sampling,
    alter,
    near_miss,
    prepare,
)
from metasae_lib.show import examples
from metasae_lib.show.published import load_published
from metasae_lib.study.errors import MeasureError

WORDS = [f" w{i}" for i in range(40)]


def pieces(ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(WORDS[i] for i in ids)


def example(ids: Sequence[int], acts: Sequence[float], segment: int = 0) -> Example:
    return Example(tuple(ids), pieces(ids), tuple(acts), segment)


def materials(n: int = 24, sampling: Sampling | None = None) -> list[Material]:
    """Features that fire on token `feature % 12` alone, the more the earlier it stands."""
    sampling = sampling or Sampling()
    marginal = Marginal([0] * 12 + [1] * 28)
    generator = np.random.default_rng(1)
    made = []
    for feature in range(n):
        token, firing, silent = feature % 12, [], []
        for k in range(2 * sampling.examples):
            ids = generator.integers(12, 40, size=8).tolist()
            acts = [0.0] * 8
            if k < sampling.examples:
                place = int(generator.integers(8))
                ids[place], acts[place] = token, 1.0 + k
            (firing if k < sampling.examples else silent).append(example(ids, acts, k))
        made.append(
            prepare(
                feature, firing[: sampling.explain], firing[sampling.explain :], silent, sampling,
                marginal, pieces,  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return made


class Oracle:
    """Knows that the explanation is the token itself. `wrong`: how its fuzzing answers are bent."""

    def __init__(self, wrong: str = "") -> None:
        self.identity: dict[str, Any] = {"judge": f"oracle {wrong}"}
        self.wrong = wrong

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        for index, question in enumerate(questions):
            holds = [question.explanation in (*e.pieces, "") for e in question.examples]
            if self.wrong == "says A" and question.task == "fuzzing":
                yield index, "A"
            elif self.wrong == "mumbles":
                yield index, "A strange text"
            elif question.task == "fuzzing":
                yield index, "AB"[holds[1] and not holds[0]] if holds[0] != holds[1] else "?"
            elif question.task == "strength":
                yield index, str(sum(question.examples[0].acts) / 2 if holds[0] else 0)
            else:
                yield index, "yes" if holds[0] else "no"


def test_fuzzing_score_by_hand() -> None:
    assert scoring.fuzzing_score([True, True, True, False]) == 0.5
    assert scoring.fuzzing_score([True, None, None]) == 1.0
    assert scoring.fuzzing_score([False, False]) == -1.0
    assert scoring.fuzzing_score([None, None]) is None
    assert scoring.fuzzing_score([]) is None


def test_spearman_score_by_hand() -> None:
    assert scoring.spearman_score([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert scoring.spearman_score([3, 2, 1], [10, 20, 30]) == pytest.approx(-1)
    assert scoring.spearman_score([5, 5, 5], [1, 2, 3]) == 0.0
    assert scoring.spearman_score([1, None, 3], [1, 2, 3]) is None
    assert scoring.spearman_score(None, [1, 2, 3]) is None
    assert scoring.spearman_score([1, 2, 3], [4, 4, 4]) is None
    with pytest.raises(MeasureError, match="give one for each"):
        scoring.spearman_score([1, 2], [1, 2, 3])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=2, max_size=30))
def test_spearman_score_is_pearson_of_the_ranks(points: list[tuple[int, int]]) -> None:
    predicted, actual = zip(*points, strict=True)
    ours = scoring.spearman_score(list(predicted), list(actual))
    if len(set(actual)) < 2:
        assert ours is None
    elif len(set(predicted)) < 2:
        assert ours == 0.0
    else:
        ranks = [scipy.stats.rankdata(values) for values in (predicted, actual)]
        assert ours == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_detection_score_by_hand() -> None:
    assert scoring.detection_score([True, True, False], [True, True, False]) == 1.0
    # 3 of 4 true ones and 1 of 2 false ones
    assert (
        scoring.detection_score([True] * 3 + [False] * 2 + [True], [True] * 4 + [False] * 2)
        == 0.625
    )
    assert scoring.detection_score([True, None, False, None], [True, True, False, False]) == 1.0
    assert scoring.detection_score([True, None], [True, False]) is None
    assert scoring.detection_score([True] * 10, [True] * 9 + [False]) == 0.5
    with pytest.raises(MeasureError, match="give one for each"):
        scoring.detection_score([True], [True, False])


def test_material_keeps_its_promises() -> None:
    sampling = Sampling(rounds=6)
    first = 0
    for material in materials(40, sampling):
        token = material.feature % 12
        explained = {e.segment for e in material.explain.examples}
        assert not explained & {e.segment for e in material.examples}
        assert not set(material.explain.against) & set(material.silent)
        for (a, b), real in zip(material.pairs, material.real, strict=True):
            kept, altered = (a, b) if real == 0 else (b, a)
            assert token in kept.ids
            assert token not in altered.ids
            assert kept.segment != altered.segment
            # Only the strongest token differs from the text it was made from.
            source = next(e for e in material.examples if e.segment == altered.segment)
            assert sum(x != y for x, y in zip(source.ids, altered.ids, strict=True)) == 1
            assert altered.text == "".join(pieces(altered.ids))
        assert sum(material.real) == 3  # the order is balanced within every feature
        first += material.real[0]
    assert 10 < first < 30


def test_material_is_a_function_of_the_seed() -> None:
    assert materials(3) == materials(3)
    assert materials(3) != materials(3, Sampling(seed=1))


def test_marginal_draws_as_the_text_has_tokens() -> None:
    generator = np.random.default_rng(0)
    marginal = Marginal([5, 0, 3, 2, 100], leave_out=[4, 700])
    drawn = np.bincount([marginal.draw(generator, 9) for _ in range(20_000)], minlength=5)
    assert drawn / 20_000 == pytest.approx([0.5, 0, 0.3, 0.2, 0], abs=0.02)
    assert all(marginal.draw(generator, 0) != 0 for _ in range(200))
    with pytest.raises(MeasureError, match="two tokens"):
        Marginal([0, 4, 0])


def test_alter_replaces_what_is_at_half_of_the_peak() -> None:
    before = example([0, 1, 2, 3], [4.0, 1.9, 2.0, 0.0])
    marginal = Marginal([0] * 20 + [1] * 20)
    after = alter(before, marginal, pieces, np.random.default_rng(0))  # type: ignore[arg-type]
    assert [a == b for a, b in zip(before.ids, after.ids, strict=True)] == [
        False, True, False, True
    ]  # fmt: skip


def test_a_judge_that_knows_scores_full_and_a_wrong_explanation_does_not() -> None:
    made = materials()
    answers = scoring.answers_of(Oracle())
    right = scoring.score(made, [WORDS[m.feature % 12] for m in made], answers)
    assert (right.fuzzing == 1).all() and (right.detection == 1).all()
    assert (right.spearman > 0.99).all() and (right.unreadable == 0).all()
    wrong = scoring.score(made, [WORDS[(m.feature + 1) % 12] for m in made], answers)
    assert (wrong.detection == 0.5).all()
    assert (wrong.spearman == 0).all()
    assert wrong.fuzzing.isna().all()  # it sees no difference, and says so
    assert (wrong.unreadable == 4).all()


def test_unreadable_answers_are_counted_and_never_right() -> None:
    made = materials(4)
    frame = scoring.score(made, ["x"] * 4, scoring.answers_of(Oracle("mumbles")))
    assert (frame.unreadable == frame.asked).all() and (frame.asked == 4 + 5 + 10).all()
    assert frame[list(scoring.SCORES)].isna().all(axis=None)


def test_features_without_an_explanation_are_kept_in_the_table() -> None:
    frame = scoring.score(materials(3), [None, WORDS[1], None], scoring.answers_of(Oracle()))
    assert list(frame.feature) == [0, 1, 2]
    assert list(frame.asked) == [0, 19, 0]
    assert list(frame.fuzzing.isna()) == [True, False, True]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 3))
def test_shuffled_is_a_permutation_without_right_ones(texts: list[int], seed: int) -> None:
    given_to = controls.shuffled([str(t) for t in texts], seed)
    assert sorted(map(str, given_to)) == sorted(map(str, texts))
    if len(set(texts)) == len(texts):
        assert all(str(a) != b for a, b in zip(texts, given_to, strict=True))


def judged(wrong: str = "") -> pd.DataFrame:
    made, answers = materials(), scoring.answers_of(Oracle(wrong))
    right: list[str | None] = [WORDS[m.feature % 12] for m in made]
    wrong_ones = controls.shuffled(right)
    given = {"right": right, "near": wrong_ones, "shuffled": wrong_ones, "empty": [""] * len(made)}
    groups = dict.fromkeys(PLANTED, controls.Group(made, given))
    groups["features"] = controls.Group(made[:4], {name: g[:4] for name, g in given.items()})
    return controls.control_table(groups, answers, answers)


def test_the_controls_pass_a_judge_that_knows() -> None:
    table = judged()
    assert set(table.group) == {"meaning", "form", "features"}
    assert set(table.condition) == {"right", "near", "shuffled", "empty", "again"}
    for name in scoring.SCORES:
        verdict = controls.judge_verdict(table, name, "form")
        assert verdict.able and "right explanations score" in verdict.because
    summary = controls.control_summary(table).set_index(["group", "condition", "score"])
    assert summary.loc[("meaning", "right", "detection"), "mean"] == 1
    assert summary.loc[("form", "empty", "detection"), "mean"] == 0.5


def test_the_controls_fail_judges_that_do_not() -> None:
    says_a = controls.judge_verdict(judged("says A"), "fuzzing", "form")
    assert not says_a.able and "says 'A' in 100% of the rounds" in says_a.because
    mumbles = controls.judge_verdict(judged("mumbles"), "fuzzing", "form")
    assert not mumbles.able and "100% of the answers unreadable" in mumbles.because
    with pytest.raises(MeasureError, match="no score"):
        controls.judge_verdict(judged(), "fuzz", "form")
    no_form = judged().query("group != 'form'")
    assert "too few words of form" in controls.judge_verdict(no_form, "fuzzing", "form").because


def test_the_lexical_judge_learns_a_token_and_loses_it_when_shuffled() -> None:
    made, answers = materials(), scoring.answers_of(LexicalJudge())
    explanations = scoring.explain(made, answers)
    right = scoring.score(made, explanations, answers)
    assert (right.fuzzing == 1).all() and (right.detection == 1).all()
    wrong = scoring.score(made, controls.shuffled(explanations), answers)
    assert wrong.detection.mean() < 0.75
    assert scoring.in_words(explanations[5]) == "w5"
    assert scoring.in_words('{"tokens": [1]}') == '{"tokens": [1]}'  # what a judge may say, too
    assert scoring.in_words("any sentence") == "any sentence" and scoring.in_words(None) is None


def paired(base: Any, joint: Any, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {"base": base, "joint": joint, "cosine": 1.0, "seed": seed, "against": "solo",
         "base_arm": f"solo-seed{seed}", "joint_arm": f"joint-seed{seed}"}
    )  # fmt: skip


def test_compare_agrees_with_scipy() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(0, 1, 60), generator.normal(0.3, 1, 60)
    b[7] = math.nan
    pairs = paired(np.arange(60), np.arange(60)[::-1])
    solo = pd.DataFrame({"feature": np.arange(60), "fuzzing": a, "arm": "solo-seed0"})
    joint = pd.DataFrame({"feature": np.arange(60), "fuzzing": b[::-1], "arm": "joint-seed0"})
    found = comparison.compare(pairs, pd.concat([solo, joint]), "fuzzing", 500)
    kept = np.delete(np.arange(60), 7)
    test = scipy.stats.ttest_rel(b[kept], a[kept])
    assert found["n"] == 59 and found["lost"] == 1
    assert found["t"] == pytest.approx(test.statistic) and found["p"] == pytest.approx(test.pvalue)
    reach = test.confidence_interval()
    assert found["low"] == pytest.approx(reach.low, abs=0.08)
    assert found["high"] == pytest.approx(reach.high, abs=0.08)
    assert found["higher"] == (b[kept] > a[kept]).mean()
    none = comparison.compare(pairs[:0], pd.concat([solo, joint]), "fuzzing", 10)
    assert none == {"n": 0, "lost": 0}
    assert found["over"] == "features" and found["n_seeds"] == 1


def test_seeds_are_the_unit_where_there_are_several() -> None:
    """Four seeds' mean differences 1, 2, 3, 4: the t interval of those, not of the features."""
    frames, pairs = [], []
    for seed in range(4):
        pairs.append(paired(np.arange(2), np.arange(2), seed))
        for kind, values in (("solo", [0.0, 10.0]), ("joint", [seed + 1.0, seed + 11.0])):
            arm = f"{kind}-seed{seed}"
            frames.append(pd.DataFrame({"feature": range(2), "fuzzing": values, "arm": arm}))
    found = comparison.compare(pd.concat(pairs), pd.concat(frames), "fuzzing", 100)
    test = scipy.stats.ttest_1samp([1, 2, 3, 4], 0).confidence_interval()
    assert found["delta"] == 2.5 and found["n"] == 8 and found["n_seeds"] == 4
    assert (found["low"], found["high"]) == pytest.approx((test.low, test.high))
    assert found["over"] == "seeds and features"
    assert found["scatter"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1))


def test_pairs_needed_at_the_papers_effect() -> None:
    # t = 8.12 over 20,456 pairs: a spread of 0.0175 √20456 / 8.12 = 0.308 (NOTES 2.9: d = 0.057).
    spread = 0.0175 * math.sqrt(20456) / 8.12
    assert 0.0175 / spread == pytest.approx(0.057, abs=0.0005)
    assert comparison.pairs_needed(spread) == pytest.approx(
        (1.96 + 0.8416) ** 2 / 0.0568**2, rel=0.01
    )


def test_density_difference_by_hand() -> None:
    frame = comparison.density_difference([-1, 0, 0.5, 1], [1, 0, 0.5, 1], bins=4, resamples=50)
    assert list(frame.score) == [-0.75, -0.25, 0.25, 0.75]
    # One of four pairs moved from the first bin to the last; bins are half a unit wide.
    assert list(frame.difference) == [-0.5, 0, 0, 0.5]
    assert (frame.low <= frame.difference).all() and (frame.difference <= frame.high).all()


def test_comparisons_and_figure_2_of_every_judge() -> None:
    made, answers = materials(), scoring.answers_of(Oracle())
    right = scoring.score(made, [WORDS[m.feature % 12] for m in made], answers)
    half = [WORDS[(m.feature + m.feature % 2) % 12] for m in made]  # odd ones are wrong
    frames = [
        scoring.score(made, half, answers).assign(judge="oracle", arm="solo-seed0"),
        right.assign(judge="oracle", arm="joint-seed0"),
    ]
    scores = pd.concat(frames, ignore_index=True)
    pairs = paired(range(24), range(24))
    compared = comparison.compare_all({"oracle": pairs}, scores, 100).set_index(["pairs", "score"])
    detection = compared.loc[("matched", "detection")]
    assert detection["base"] == 0.75 and detection["joint"] == 1 and detection["delta"] == 0.25
    assert detection["n"] == 24 and detection["ties"] == 12 and detection["higher"] == 1
    assert compared.loc[("matched", "fuzzing"), "lost"] == 12  # unanswered, counted
    assert set(comparison.figure_2({"oracle": pairs}, scores).judge) == {"oracle"}
    assert comparison.figure_2({"oracle": pairs[:0]}, scores).empty


def test_the_first_line_says_whether_the_judge_is_able() -> None:
    verdicts = controls.verdict_table({"oracle": judged(), "mumbler": judged("mumbles")})
    assert list(verdicts.able) == [True] * 6 + [False] * 6
    fine = controls.fineness(judged().assign(concept="any"), 100)
    line = controls.first_lines(verdicts, fine, "oracle", 100)
    assert line.startswith("**The oracle judge is able to judge")
    line = controls.first_lines(verdicts, fine, "mumbler", 100)
    assert line.startswith("**The mumbler judge is unable to judge")
    assert "say nothing about the dictionaries" in line


def test_fineness_by_hand() -> None:
    """Two features of each of two concepts, and a blend of both."""
    rows = [
        ("meaning", "right", "a", 1.0), ("meaning", "right", "a", 0.8),
        ("form", "right", "b", 0.6), ("form", "right", "b", 0.2),
        ("meaning", "near", "a", 0.5), ("meaning", "near", "a", 0.5),
        ("form", "near", "b", 0.1), ("form", "near", "b", 0.1),
        ("blends", "right", "a + b", 0.5), ("blends", "half", "a + b", 0.4),
        ("blends", "right", "a + missing", 0.9), ("blends", "half", "a + missing", 0.4),
        ("features", "right", "", 0.1), ("features", "right", "", 0.5),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["group", "condition", "concept", "fuzzing"])
    fine = controls.fineness(table, 100)
    assert fine["near"].difference == pytest.approx(np.mean([0.5, 0.3, 0.5, 0.1]))
    assert fine["blend"].difference == pytest.approx(0.5 - (0.9 + 0.4) / 2)
    assert fine["half"].difference == pytest.approx(0.3)
    # Two features differ by √2 times their deviation; a power of 80% takes 2.8 standard errors.
    spread = np.std([0.1, 0.5], ddof=1) * math.sqrt(2)
    assert fine["smallest"].difference == pytest.approx(2.8016 * spread / 10, rel=1e-4)


def test_published_values_have_the_papers_ids() -> None:
    published = load_published()
    found = {"base": 0.23, "joint": 0.248, "delta": 0.0175, "low": 0.01, "high": 0.03, "t": 8.12,
             "p": 5e-16, "higher": 0.516, "higher_low": 0.5, "higher_high": 0.53,
             "scatter": 0.02}  # fmt: skip
    rows = comparison.published_values(found, 20456).set_index("id")
    gemma = "gemma-2-9b.fuzz_delta_pct_selected"  # the same quantity of another model
    assert rows.value.pop(gemma) == rows.value["gpt2-large.fuzz_delta_pct"]
    rows = rows.drop(gemma)
    # In percent of the solo mean; a share of pairs says nothing of seeds.
    change = rows.scatter.filter(like="_delta").tolist()
    assert change == pytest.approx([0.02, 2 / 0.23]) and rows.scatter.count() == 2
    for value_id, row in rows.iterrows():
        assert row.value == pytest.approx(published[str(value_id)], rel=0.01)
    assert {i for i in published.values if ".fuzz_" in i and i.startswith("gpt2-large.")} - {
        "gpt2-large.setup.fuzz_features_per_config"
    } == set(rows.index) - {"gpt2-large.matched_pairs"}
    assert comparison.published_values({"n": 0, "lost": 3}, 5).value.isna().sum() == 8


def test_text_of_the_web_is_escaped() -> None:
    nasty = Example((1, 2), ("<script>", '"&'), (2.0, 0.0), 0, ("sotu", "hf:<b>"))
    scored = {"feature": 0, "explanation": None, "fuzzing": 0, "spearman": 0, "detection": 0}
    contexts: Any = SimpleNamespace(top=lambda feature, count: [nasty] * count)
    shown = examples.examples_page(contexts, pd.DataFrame([scored]), 1)
    assert "<script>" not in shown and "&lt;script&gt;</mark>&quot;&amp;" in shown
    assert "<small>State of the Union (public domain); hf:&lt;b&gt;</small>" in shown


def test_a_shown_feature_may_have_no_explanation() -> None:
    """Beside one that has, which makes NaN of the missing one."""
    scored = [{"feature": i, "explanation": text, "fuzzing": 0, "spearman": 0, "detection": 0}
              for i, text in enumerate(("about rain", None))]  # fmt: skip
    contexts: Any = SimpleNamespace(top=lambda feature, count: [])
    shown = examples.examples_page(contexts, pd.DataFrame(scored), 1)
    assert "0</strong>: about rain<" in shown and "1</strong>: no explanation<" in shown


def test_sentences_against_lists_where_a_judge_scored_few() -> None:
    """Two features have both fuzzing scores (differences 0.1 and 0.3), one has both detections."""
    nan = math.nan
    both = pd.DataFrame(
        {
            "feature": [1, 2, 3] * 2,
            "explainer": ["sentence"] * 3 + ["list"] * 3,
            "explanation": list("abcdef"),
            "fuzzing": [0.2, 0.4, nan, 0.1, 0.1, 0.5],
            "spearman": [0.2, nan, nan, nan, 0.1, nan],
            "detection": [nan, 0.5, nan, 0.5, 0.75, 0.5],
        }
    )
    said = show.sentences_and_lists(both).data.splitlines()[0]
    reach = 0.1 * scipy.stats.t.ppf(0.975, 1)
    ends = f"−{reach - 0.2:.3f} to +{0.2 + reach:.3f}"
    assert f"fuzzing +0.200 ({ends}), spearman of no feature with both, detection −0.250" in said


def test_a_score_without_a_control_is_not_believed() -> None:
    table = judged().assign(spearman=math.nan)
    verdict = controls.judge_verdict(table, "spearman", "form")
    assert not verdict.able and "nothing to score" in verdict.because


def test_delphi_records_hold_the_examples_that_are_asked_about() -> None:
    made = materials(3)
    delphi_records = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "delphi.py"))[
        "delphi_records"
    ]
    records = json.loads(json.dumps(delphi_records(made, ["zero", None, "two"])))
    assert [record["latent"]["latent_index"] for record in records] == [0, 2]
    record, material = records[1], made[2]
    assert record["explanation"] == "two"
    assert [e["tokens"] for e in record["test"]] == [list(e.ids) for e in material.examples]
    assert [e["quantile"] for e in record["test"]] == [0, 1, 2, 3, 4]
    assert [e["str_tokens"] for e in record["train"]] == [
        list(e.pieces) for e in material.explain.examples
    ]
    assert not any(any(e["activations"]) for e in record["not_active"])
    assert all(e["activations"][e["tokens"].index(2)] > 0 for e in record["test"])


def test_order_bias_and_retest_are_among_the_controls() -> None:
    for wrong, share in (("", 0.5), ("says A", 1.0)):
        table = controls.control_summary(judged(wrong)).set_index(["group", "condition", "score"])
        assert table.loc[("form", "right", "order bias"), "mean"] == share
        assert table.loc[("form", "detection", "asked again"), "mean"] == 1.0
    forgetful = judged()
    again = forgetful.condition == "again"
    generator = np.random.default_rng(0)
    forgetful.loc[forgetful.condition == "right", "detection"] = generator.random(52)
    forgetful.loc[again, "detection"] = generator.random(again.sum())
    assert (
        "asked again, correlation" in controls.judge_verdict(forgetful, "detection", "form").because
    )
    row = controls.control_summary(forgetful).set_index(["group", "condition", "score"])
    row = row.loc["form", "detection"]
    assert row.loc["asked again", "low"] < 0 < row.loc["asked again", "high"]


def test_pairs_kept_with_the_same_start_and_with_another() -> None:
    """By hand: all rows of the joint arm are rows of one solo arm, two are rows of the other."""
    eye = torch.eye(4)

    def arm(kind: str, seed: int, rows: torch.Tensor) -> Any:
        return SimpleNamespace(
            spec=SimpleNamespace(kind=kind, seed=seed), sae=SimpleNamespace(directions=rows)
        )

    turned = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 1, -1, 0], [0, 0, 0, 1.0]])
    joint = arm("joint", 0, eye[[2, 0, 1, 3]])
    arms = {"solo-seed0": arm("solo", 0, eye), "solo-seed1": arm("solo", 1, turned), "j": joint}
    found = comparison.kept_pairs(arms, joint, [0.5, 0.9]).set_index("with")
    assert found.loc["solo-seed0, same start"].tolist() == [1.0, 1.0]
    assert found.loc["solo-seed1, another start"].tolist() == [1.0, 0.5]


def test_near_misses_are_of_one_kind_and_mutual() -> None:
    for named in PLANTED.values():
        for name in named:
            assert near_miss(name) in named and near_miss(name) != name
            assert near_miss(near_miss(name)) == name
            assert not set(named[name]) & set(named[near_miss(name)])


def test_rivals_are_of_the_same_seed_and_of_the_nearest_l2() -> None:
    rows = [
        ("solo", 0, None, None, None, 0.10), ("solo", 1, None, None, None, 0.11),
        ("joint", 0, 0.3, 1.0, None, 0.14), ("joint", 1, 0.3, 1.0, None, 0.15),
        ("joint", 0, 0.1, 1.0, None, 0.12), ("frontier", 0, None, None, 25, 0.20),
        ("frontier", 0, None, None, 29, 0.13), ("frontier", 1, None, None, 29, 0.14),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["kind", "seed", "lambda2", "sigma_sq", "k", "l2"])
    table["arm"] = [f"{r.kind}-{i}" for i, r in enumerate(table.itertuples())]
    training = SimpleNamespace(given={})
    run = SimpleNamespace(profile=SimpleNamespace(selected=(0.3, 1.0), training=training))
    found = comparison.rivals(run, table)  # type: ignore[arg-type]
    assert found.to_numpy().tolist() == [
        ["solo", 0, "solo-0", "joint-2"], ["solo", 1, "solo-1", "joint-3"],
        ["frontier", 0, "frontier-6", "joint-2"], ["frontier", 1, "frontier-7", "joint-3"],
    ]  # fmt: skip
    alone = comparison.rivals(run, table[table.kind != "frontier"])  # type: ignore[arg-type]
    assert set(alone.against) == {"solo"}
