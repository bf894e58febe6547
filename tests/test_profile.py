"""Profiles: what loads, what overrides do, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from metasae_lib.__main__ import main
from metasae_lib.measure.speed import measured_costs
from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import ProfileError
from metasae_lib.study.known import ModelShape, model_shape
from metasae_lib.study.plan import Costs, machines, plan_text, shape_of, stage_seconds
from metasae_lib.study.profile import Profile
from metasae_lib.train.learner import Learner, Losses

REPOSITORY = Path(__file__).resolve().parents[1]
PROFILES = sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.yml"))


def sentence(profile: str | Path, overrides: Any = None) -> str:
    """The error of a bad profile, which must be one line without pydantic's own words."""
    with pytest.raises(ProfileError) as caught:
        Profile.load(profile, overrides)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text and "validation error" not in text
    return text


def write(folder: Path, **sections: Any) -> Path:
    """A copy of `tiny` called `own`, with whole sections replaced."""
    values = yaml.safe_load((REPOSITORY / "profiles" / "tiny.yml").read_text())
    values.update({"name": "own", **sections})
    path = folder / "own.yml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_five_profiles_load() -> None:
    assert {"tiny", "smollm2-135m", "gemma-3-270m", "gpt2-large", "gemma-2-9b"} <= set(PROFILES)
    for name in PROFILES:
        profile = Profile.load(name)
        assert profile.name == name and profile.overrides_hash == ""
        assert len({arm.name for arm in profile.arms()}) == len(profile.arms())


@pytest.mark.parametrize("name", ["gpt2-large", "gemma-2-9b"])
def test_paper_profiles_equal_the_printed_setup(name: str) -> None:
    published = yaml.safe_load((REPOSITORY / "book" / "published.yml").read_text())
    setup = {key: entry["value"] for key, entry in published["setup"][name].items()}
    profile = Profile.load(name)
    ours = {
        "layer": profile.model.layer,
        **profile.dictionary.model_dump(),
        **profile.training.model_dump(),
        "context_length": profile.text.context_length,
        "train_tokens": profile.training.train_tokens,
        "cooccurrence_tokens": profile.text.roles["scan"],
        "calibration_tokens": profile.text.roles["calibration"],
        "autointerp_tokens": profile.text.roles["contexts"],
    }
    shape = profile.shape
    assert shape is not None and shape.d_model == setup["d_model"]
    assert setup.get("n_layers", shape.n_layers) == shape.n_layers
    shared = setup.keys() & ours.keys()
    assert len(shared) >= 7
    assert {key: ours[key] for key in shared} == {key: setup[key] for key in shared}


def test_arms_of_the_paper() -> None:
    names = [arm.name for arm in Profile.load("gpt2-large").arms()]
    grid = [
        f"joint-lambda{a}-sigma{b}-seed0" for a in ("0.1", "0.3", "1") for b in ("0.3", "1", "3")
    ]
    seeds = [f"joint-lambda0.3-sigma1-seed{seed}" for seed in (1, 2, 3)]
    paper = [f"solo-seed{seed}" for seed in range(4)] + grid + seeds + ["control-sigma1-seed0"]
    assert names[: len(paper)] == paper and len(set(names)) == len(names)
    assert [name.split("-seed")[0] for name in names[len(paper) :]] == [
        "jumprelu", "jumprelu-lambda0.3-sigma1", "jumprelu-k32", "jumprelu-k32-lambda0.3-sigma1",
        "batchtopk-k32", "batchtopk-k32-lambda0.3-sigma1", "ortsae",
        *(f"frontier-k{k}" for _ in range(3) for k in (60, 56, 48)),
        "as-released", "as-released-lambda0.3-sigma1",
        "critic-k4-lambda0.3-sigma1", "critic-steps100to10-lambda0.3-sigma1",
    ]  # fmt: skip
    assert ArmSpec("control", 0, 0.0, 1.0) in Profile.load("tiny").arms()


def test_an_order_of_text_for_each_seed_on_request() -> None:
    changes = {"training.order": "by_seed", "training.seeds": [5, 6]}
    orders = {arm.name: arm.order for arm in Profile.load("tiny", changes).arms()}
    assert orders["solo-seed5"] == 0 and orders["solo-seed6"] == 6


def test_seeds_of_the_grid_and_of_the_frontier() -> None:
    changes = {
        "training.seeds": [0, 1, 2], "training.lambda2": [0.3, 1.0], "training.seeds_grid": 2,
        "training.arms": ["joint", "control", "frontier"], "training.frontier": [7, 6],
        "training.seeds_frontier": 3,
    }  # fmt: skip
    names = [arm.name for arm in Profile.load("tiny", changes).arms()]
    assert names == [
        *(f"joint-lambda{a}-sigma1-seed{seed}" for seed in (0, 1) for a in ("0.3", "1")),
        "joint-lambda0.3-sigma1-seed2", "control-sigma1-seed0",
        *(f"frontier-k{k}-seed{seed}" for seed in range(3) for k in (7, 6)),
    ]  # fmt: skip
    for wrong, message in (
        ({"training.frontier": []}, "one or more k below dictionary.k"),
        ({"training.frontier": [8]}, "one or more k below dictionary.k"),
        ({"training.frontier": [9]}, "one or more k below dictionary.k"),
        ({"training.frontier": [8, 7]}, "not that one again"),
    ):
        with pytest.raises(ProfileError, match=message):
            Profile.load("tiny", changes | wrong)


def test_steps_and_selected() -> None:
    assert Profile.load("tiny").steps == 60_000 // 512
    # 65,536 features would make the 2,048, 6,144, 14,336, 30,720 and 65,536 of the authors.
    assert Profile.load("tiny").prefixes == [8, 24, 56, 120, 256]
    assert Profile.load("tiny", {"dictionary.n_features": 64}).prefixes == [2, 6, 14, 30, 64]
    assert Profile.load("tiny").selected == (0.3, 1.0)
    outside = Profile.load("tiny", {"training.lambda2": [1.0, 0.1], "training.sigma_sq": [3.0]})
    assert outside.selected == (1.0, 3.0)


def test_overrides_name_the_run_only_when_they_change_something() -> None:
    same = Profile.load("tiny", {"training.lambda2": [0.3], "device": "auto"})
    assert same.overrides == {} and same.overrides_hash == ""
    one = Profile.load("tiny", {"training.lambda2": [0.1], "training.batch_tokens": 256})
    other = Profile.load("tiny", {"training": {"batch_tokens": 256, "lambda2": (0.1,)}})
    assert one.overrides == {"training.batch_tokens": 256, "training.lambda2": [0.1]}
    assert one.overrides_hash == other.overrides_hash and len(one.overrides_hash) == 8
    assert one.hash == other.hash != same.hash
    assert Profile.load("tiny").training.lambda2 == [0.3]
    roles = Profile.load("tiny", {"text.roles.scan": 31_000, "text.max_share.sotu": 0.2})
    assert roles.overrides == {"text.max_share.sotu": 0.2, "text.roles.scan": 31_000}
    assert roles.text.roles["train"] == 40_000


def test_hash_leaves_out_what_results_do_not_depend_on() -> None:
    assert Profile.load("tiny", {"device": "cpu"}).hash == Profile.load("tiny").hash
    assert Profile.load("tiny", {"about": "Else."}).hash == Profile.load("tiny").hash


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text().replace("learning_rate: 0.001", "learning_rate: 3e-4", 1)
    assert yaml.safe_load(text)["training"]["learning_rate"] == "3e-4"  # the trap
    path.write_text(text)
    assert Profile.load(path).training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.lamda2": [0.3]}, ["training.lamda2", "not a known key", "training.lambda2"]),
        ({"lambda2": [0.3]}, ["training.lambda2"]),
        ({"text.roles.trian": 5}, ["text.roles.trian", "text.roles.train"]),
        ({"text": {"roles": {"trian": 5}}}, ["text.roles.trian", "text.roles.train"]),
        ({"text.max_share.sot": 0.1}, ["text.max_share.sot", "text.max_share.sotu"]),
        ({"training": 3}, ["training is a section", "training.train_tokens"]),
        ({"training.lambda2": 0.3}, ["training.lambda2", "must be a list", "0.3"]),
        ({"training.lambda2": []}, ["training.lambda2", "at least 1"]),
        ({"training.lambda2": [0.0]}, ["training.lambda2.0", "above 0"]),
        ({"training.lambda2": [0.3, 0.3]}, ["training.lambda2", "0.3 twice"]),
        ({"training.sigma_sq": ["big"]}, ["training.sigma_sq.0", "must be a number", "'big'"]),
        ({"training.seeds": [1, 1]}, ["training.seeds", "1 twice"]),
        ({"training.seeds": [-1]}, ["training.seeds.0", "at least 0"]),
        ({"training.selected": [0.3]}, ["training.selected", "at least 2"]),
        ({"training.arms": ["solos"]}, ["training.arms", "'solos'", "'solo'"]),
        ({"training.matryoshka_prefixes": [0.5]}, ["training.matryoshka_prefixes", "the last 1"]),
        ({"training.matryoshka_prefixes": [0.5, 0.1, 1.0]}, ["ascending shares"]),
        ({"training.learning_rate": float("nan")}, ["training.learning_rate", "finite"]),
        ({"training.learning_rate": True}, ["training.learning_rate", "must be a number"]),
        ({"training.betas": [0.9, 1.0]}, ["training.betas.1", "below 1"]),
        ({"training.k_aux": 300}, ["training.k_aux", "dictionary.n_features"]),
        ({"training.batch_tokens": 60_001}, ["training.train_tokens", "training.batch_tokens"]),
        ({"training.batch_tokens": 512.0}, ["training.batch_tokens", "whole number"]),
        ({"training.batch_tokens": "512"}, ["training.batch_tokens", "whole number"]),
        ({"dictionary.k": 257}, ["dictionary.k", "257", "dictionary.n_features (256)"]),
        ({"dictionary.meta_k": 33}, ["dictionary.meta_k", "dictionary.n_meta_features (32)"]),
        ({"model.layer": 30}, ["model.layer is 30", "30 layers", "1 to 29"]),
        ({"model.layer": 0}, ["model.layer", "at least 1"]),
        ({"model.source": "embedded:smollm"}, ["model.source", "embedded:smollm2-135m"]),
        ({"model.source": "gpt2"}, ["model.source", "hub:<owner/name>[@<revision>]"]),
        ({"model.source": "folder:/no/such"}, ["model.source", "/no/such", "config.json"]),
        ({"model.dtype": "bf16"}, ["model.dtype", "'bfloat16' or 'float32'", "'bf16'"]),
        ({"device": "gpu"}, ["device", "'auto', 'cpu' or 'cuda'", "'gpu'"]),
        ({"text.source": "fineweb"}, ["text.source", "hf:<dataset>"]),
        ({"text.roles.scan": 0}, ["text.roles.scan", "at least 1"]),
        ({"text.roles.contexts": 100}, ["text.roles.contexts", "one row"]),
        ({"text.roles.train": 9_000_000}, ["text.roles.train", "9,000,000", "lower it"]),
        ({"evaluation.ce_rows": 300}, ["evaluation.ce_rows", "236 rows", "text.roles.scan"]),
        ({"name": "other"}, ["name cannot be overridden"]),
        ({"model.source": "folder:" + "a" * 5000}, ["model.source names the folder"]),
        ("{'training.k_aux': 1}", ["overrides must map", "papermill"]),
    ],
)  # fmt: skip
def test_bad_overrides(overrides: Any, words: list[str]) -> None:
    text = sentence("tiny", overrides)
    assert all(word in text for word in words), text


def test_bad_files(tmp_path: Path) -> None:
    assert "nearest is 'smollm2-135m'" in sentence("smolm2-135m")
    assert "there is no profile file" in sentence(tmp_path / "none.yml")
    path = write(tmp_path, dictionary={"n_features": 256, "k": 8, "meta_k": 4})
    assert "dictionary.n_meta_features is missing" in sentence(path)
    path = write(tmp_path, dictonary={})
    assert "dictonary is not a known key" in sentence(path)
    path = write(tmp_path, name="other")
    assert "own.yml" in sentence(path) and "'other'" in sentence(path)
    path.write_text("name: own\nmodel: {source: [}\n")
    assert "not valid YAML at line 2" in sentence(path)
    path.write_text("name: own\nname: own\n")
    assert "the key name is written twice" in sentence(path)
    path.write_text("name: own\0\n")
    assert "not valid YAML" in sentence(path)
    path.write_text("- a list\n")
    assert "holds no keys" in sentence(path)
    text = {"source": "files:" + str(tmp_path / "*.txt"), "max_share": {}}
    assert "no file is there" in sentence("tiny", {"text": text})
    (tmp_path / "a.txt").write_text("Some text.")
    assert Profile.load("tiny", {"text": text}).text.max_share == {}


def test_names_that_a_book_does_not_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profiles").mkdir()
    for name in ("own", "Own"):
        write(tmp_path, name=name).rename(tmp_path / "profiles" / f"{name}.yml")
    monkeypatch.chdir(tmp_path)
    assert "capitals alone" in sentence("own")


def test_surrogates_in_a_profile_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    values = yaml.safe_load((REPOSITORY / "profiles" / "tiny.yml").read_text())
    path.write_text(json.dumps(values | {"name": "own", "about": "😀 \ud83d"}))
    assert Profile.load(path).about == "😀 \ufffd"


def test_shape_of_a_local_folder(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = f"folder:{tmp_path}"
    assert model_shape(source) == ModelShape(4, 32, 12 * 32**2, 100)
    assert "4 layers: choose 1 to 3" in sentence("tiny", {"model.source": source, "model.layer": 4})
    (tmp_path / "config.json").write_text("{}")
    assert "layers, width and vocabulary" in sentence("tiny", {"model.source": source})


def test_known_shapes_have_the_sizes_that_the_models_are_named_for() -> None:
    millions = {"gpt2-large": 774, "gemma-2-9b": 9242, "smollm2-135m": 134.5, "gemma-3-270m": 268}
    for name, expected in millions.items():
        shape = Profile.load(name).shape
        assert shape is not None and shape.parameters / 1e6 == pytest.approx(expected, rel=0.005)


def test_importing_the_package_is_light() -> None:
    code = "import metasae_lib, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", PROFILES)
def test_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("in all") and "h100" in lines[2] for line in lines)


def test_plan_against_hand_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """100M tokens · 20 blocks · (2·12·1280² + 4·128·1280) · 128/127 at 300 TFLOP/s: 269 s.
    An arm: 1280 · (26 bytes · (20,480 + 1,800) + 8 · 20,480) = 0.95 GB, two weights with moments in
    float32, one again in bf16, and a pull twice; counts 4 · 20,480² = 1.68 GB."""
    assert main(["plan", "gpt2-large", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "4 min" in next(
        line for line in out.splitlines() if line.startswith("residuals, training")
    )
    assert "0.95 GB of memory, with Adam" in out and "1.68 GB of memory" in out
    assert "a100" not in out


def test_steps_of_a_planned_gpu_are_those_that_were_measured() -> None:
    measured = pd.read_csv(REPOSITORY / "book" / "scale" / "gpu.csv")
    assert len(measured) == 12
    for row in measured.to_dict("records"):
        n = row["n"]
        sizes = {"n_features": n, "k": row["k"], "n_meta_features": round(0.09 * n), "meta_k": 8}
        profile = Profile.load(
            "tiny", {"dictionary": sizes, "training": {"batch_tokens": row["batch"]}}
        )
        shape = ModelShape(n_layers=5, d_model=row["d"], block_parameters=1, vocabulary=9)
        costs = machines()["h200"].costs(profile, shape)
        planned = 1e3 * (costs.solo if row["arm"] == "solo" else costs.joint)
        assert planned == pytest.approx(row["ms"], rel=0.25), row


def test_stages_are_sums_of_units() -> None:
    """By hand: 2 arms, one with the penalty, 40 steps; rows of 16 tokens of which 15 count."""
    profile = Profile.load(
        "tiny",
        {
            "model.layer": 3, "model.batch_rows": 8, "text.context_length": 16,
            "text.skip_first": True, "training.arms": ["solo", "control"], "training.seeds": [0],
            "text.roles": {"train": 1500, "calibration": 300, "scan": 600, "contexts": 300},
            "training.train_tokens": 40 * 256, "training.batch_tokens": 256,
            "evaluation.ce_rows": 32,
        },
    )  # fmt: skip
    costs = Costs(
        block=1,
        head=5,
        solo=2,
        joint=3,
        calibration=7,
        scan=11,
        reconstruction=13,
        memory=8,
        gpu=False,
    )
    shape = ModelShape(n_layers=5, d_model=64, block_parameters=1, vocabulary=9)
    found = stage_seconds(profile, shape, costs, 2)
    assert list(found.values()) == [
        1600 * 3, 1280 * 3, 40 * (2 + 3), 2 * 300 * 7, 2 * 600 * 11,
        # Of 32 rows: 3 blocks once; then 2 blocks and the head, plain, twice, and on 8 rows twice.
        2 * 600 * 13 + 32 * 16 * (3 + (1 + 2 * (1 + 8 / 32)) * (2 + 5)),
    ]  # fmt: skip


def test_costs_are_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    profile = Profile.load("tiny")
    costs = measured_costs(profile, shape_of(profile))
    assert all(0 < value < 1 for value in astuple(costs)[:-2])
    assert costs.memory == machines()["cpu"].memory
    assert main(["plan", "tiny", "--gpu", "here"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["here"] and "Measured: here" in out


def test_steps_are_timed_with_dead_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training spends much of its time on AuxK, which a step without dead features has not."""
    dead, step = [], Learner.step

    def watched(learner: Learner, *given: Any) -> Losses:
        losses = step(learner, *given)
        dead.append(int(losses.dead) / learner.sae.n_features)
        return losses

    monkeypatch.setattr(Learner, "step", watched)
    profile = Profile.load("tiny")
    measured_costs(profile, shape_of(profile))
    primary = [share for share in dead if share]  # meta dictionaries have none
    assert primary == pytest.approx([0.2] * 8, abs=0.01)


def test_nothing_is_measured_where_no_arm_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasae_lib.measure.speed._block", None)  # the first that is measured
    profile = Profile.load("gemma-2-9b", {"dictionary.n_features": 2**21})
    with pytest.raises(ProfileError, match="of memory are needed, more than here has: "):
        measured_costs(profile, shape_of(profile))


def test_what_does_not_fit_says_what_would() -> None:
    profile = Profile.load("gemma-2-9b")
    small = replace(machines()["h100"].costs(profile, shape_of(profile)), memory=48)
    with pytest.raises(
        ProfileError, match=r"here has: set dictionary.n_features to ([\d,]+)"
    ) as no:
        plan_text(profile, [], small)
    (named,) = re.findall(r"n_features to ([\d,]+)", str(no.value))
    fits = Profile.load("gemma-2-9b", {"dictionary.n_features": int(named.replace(",", ""))})
    assert "arms trained at once" in plan_text(fits, [], small)


def test_commands_fail_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["plan", "gpt3"], ["fetch", "tiny", "gpt3"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "there is no profile 'gpt3'" in error


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"autointerp.judge": "embedding", "autointerp.model": "embedded:smollm2-135m"},
         "autointerp.model is 'embedded:smollm2-135m': choose .*embedded:all-minilm-l6-v2"),
        ({"autointerp.judge": "in-process", "autointerp.model": "embedded:all-minilm-l6-v2"},
         "autointerp.model is .*embedded:smollm2-135m"),
        ({"autointerp.explainer": "in-process", "autointerp.explainer_model": "qwen"},
         "autointerp.explainer_model is 'qwen': choose hub:"),
        ({"autointerp.judge": "embedding", "autointerp.model": "embedded:all-minilm-l6-v2",
          "autointerp.explainer": "judge"}, "the embedding judge writes no explanations"),
    ],
)  # fmt: skip
def test_judges_and_explainers_fit_their_models(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence):
        Profile.load("tiny", changes)


def test_a_profile_can_give_only_what_differs(tmp_path: Path) -> None:
    """The second step for Gemma 2 9B is the first one, longer and of fewer arms."""
    first, second = (Profile.load(name) for name in ("gemma-2-9b", "gemma-2-9b-selected"))
    changed = {"train_tokens": 375_000_000, "lambda2": [0.3], "sigma_sq": [1.0],
               "arms": ["solo", "joint", "control"]}  # fmt: skip
    names = {"name", "about", "training"}
    assert second.model_dump(exclude=names) == first.model_dump(exclude=names)
    assert second.training.model_dump() == first.training.model_dump() | changed
    assert set(second.arms()) <= set(first.arms())  # whose states it goes on from
    path = tmp_path / "alone.yml"
    path.write_text("base: nowhere\nname: alone\n")
    with pytest.raises(ProfileError, match=r"nowhere\.yml cannot be read"):
        Profile.load(path)
