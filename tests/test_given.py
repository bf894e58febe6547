"""SAELens dictionaries as arms: files as SAELens writes them, against its formulas in NumPy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file
from small_models import save_model, save_text, small_profile

from metasae_lib import Profile, Run, measure
from metasae_lib.interpret import collect_contexts, rivals
from metasae_lib.interpret.steering import scaled
from metasae_lib.measure.cross import cross_scan
from metasae_lib.measure.fidelity import replacement
from metasae_lib.study.errors import DictionaryError, ProfileError
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm, load_arms, train_arms
from metasae_lib.train.dictionary import BatchTopK, enter
from metasae_lib.train.given import load_given

Array = NDArray[Any]
Made = tuple[dict[str, Any], dict[str, Array]]  # configuration and weights
Measured = tuple[Run, dict[str, Arm], dict[str, Made]]
D, N = 32, 40
SPACES = ["none", "layer_norm", "constant_norm_rescale"]


def saelens(folder: Path, d: int = D, **changes: Any) -> Made:
    """Write a dictionary of known arrays as SAELens does."""
    rng = np.random.default_rng(len(folder.name))
    config = {
        "architecture": "jumprelu", "d_in": d, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_pre"},
    }  # fmt: skip
    config |= {key: value for key, value in changes.items() if key != "weights"}
    W_dec = rng.standard_normal((N, d))
    W_dec *= rng.uniform(0.5, 3, (N, 1)) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    weights = {
        "W_enc": W_dec.T + rng.standard_normal((d, N)) / 9,
        "W_dec": W_dec,
        "b_dec": rng.standard_normal(d) / 2,
        "b_enc": rng.standard_normal(N) / 2,
    }
    if config["architecture"] == "jumprelu":
        weights["threshold"] = rng.uniform(-0.5, 2, N)
    weights |= changes.get("weights", {})
    folder.mkdir(parents=True)
    save_file({key: w.astype(np.float32) for key, w in weights.items()},
              folder / "sae_weights.safetensors")  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return config, weights


def inputs(config: dict[str, Any], x: Array) -> tuple[Array, Array, Array]:
    """SAELens' `normalize_activations`: the inputs, what was subtracted, what it was divided by."""
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdims=True)
        std = (x - mean).std(-1, ddof=1, keepdims=True) + 1e-5
        return (x - mean) / std, mean, std
    if config["normalize_activations"] == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
        return x / scale, np.zeros_like(scale), scale
    return x, np.zeros_like(x[:, :1]), np.ones_like(x[:, :1])


def saelens_acts(config: dict[str, Any], weights: dict[str, Array], x: Array) -> Array:
    """What its `encode` gives: relu, and zero at or below the threshold. x: (t, d), float64."""
    u = inputs(config, x)[0] - weights["b_dec"] * config["apply_b_dec_to_input"]
    pre = u @ weights["W_enc"] + weights["b_enc"]
    return np.maximum(pre, 0) * (pre > weights.get("threshold", 0))


def saelens_output(config: dict[str, Any], weights: dict[str, Array], x: Array) -> Array:
    """What its `decode` gives, in the space of the residuals."""
    _, shift, scale = inputs(config, x)
    acts = saelens_acts(config, weights, x)
    return (acts @ weights["W_dec"] + weights["b_dec"]) * scale + shift


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    save_text(root / "text.jsonl")
    save_model("llama", root / "llama")
    return root


def profile_with(root: Path, **folders: Path) -> Profile:
    given = {name: str(folder) for name, folder in folders.items()}
    return small_profile(
        root / "llama", root / "text.jsonl", training__given=given, training__arms=["solo"],
        training__seeds=[0], evaluation__ce_rows=2,
    )  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
def test_activations_and_output_are_those_of_saelens(
    root: Path, tmp_path: Path, space: str, centred: bool, architecture: str
) -> None:
    config, weights = saelens(
        tmp_path / "sae", architecture=architecture, normalize_activations=space,
        apply_b_dec_to_input=centred,
    )  # fmt: skip
    sae = load_given(profile_with(root, sae=tmp_path / "sae"), "sae")
    sae.save(tmp_path / "ours")
    sae = type(sae).load(tmp_path / "ours")
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0)) * 3 + 1
    expected = saelens_acts(config, weights, x.double().numpy())
    acts = sae.encode_threshold(enter(x, sae.space)[0]).double().numpy()
    assert 0.1 < (expected > 0).mean() < 0.9
    length = np.linalg.norm(weights["W_dec"], axis=1)  # ours has rows of length 1
    np.testing.assert_allclose(acts, expected * length, atol=1e-4)
    np.testing.assert_allclose(sae.W_dec.norm(dim=1), 1, atol=1e-6)
    output = replacement(sae, "threshold")(x[None])[0].double().numpy()
    expected = saelens_output(config, weights, x.double().numpy())
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_a_feature_is_steered_in_the_space_of_its_dictionary(root: Path, tmp_path: Path) -> None:
    config, weights = saelens(tmp_path / "sae", normalize_activations="constant_norm_rescale")
    sae = load_given(profile_with(root, sae=tmp_path / "sae"), "sae")
    x = torch.randn(1, 50, D, generator=torch.Generator().manual_seed(0)) * 3
    row = x[0].double().numpy()
    act = saelens_acts(config, weights, row)[:, [7]]
    expected = row - act * weights["W_dec"][7] * inputs(config, row)[2]
    np.testing.assert_allclose(scaled(sae, 7, 0.0)(x)[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("lengths", [True, False])
def test_batchtopk_chooses_by_what_a_feature_contributes(
    root: Path, tmp_path: Path, lengths: bool
) -> None:
    """With `rescale_acts_by_decoder_norm` SAELens ranks pre-activations times row lengths."""
    changes = {"architecture": "batchtopk", "k": 3.0, "rescale_acts_by_decoder_norm": lengths}
    _, weights = saelens(tmp_path / "sae", **changes)
    profile = profile_with(root, sae=tmp_path / "sae")
    if not lengths:
        with pytest.raises(DictionaryError, match="save_inference_model"):
            load_given(profile, "sae")
        return
    sae = load_given(profile, "sae")
    assert isinstance(sae, BatchTopK) and sae.threshold is None
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    pre = (x.double().numpy() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    pre *= np.linalg.norm(weights["W_dec"], axis=1)
    expected = np.where(pre >= np.sort(pre.ravel())[-90], pre, 0)
    np.testing.assert_allclose(sae.encode(x).numpy(), expected, atol=1e-4)


@pytest.fixture(scope="module")
def measured(root: Path) -> Measured:
    """A run with one trained and three given arms, of another width than its own."""
    made = {
        "raw": saelens(root / "raw"),
        "rescaled": saelens(
            root / "rescaled", normalize_activations="constant_norm_rescale",
            architecture="standard", apply_b_dec_to_input=False,
        ),
        "batch": saelens(root / "batch", architecture="batchtopk", k=5),
    }  # fmt: skip
    run = Run.open(profile_with(root, **{name: root / name for name in made}), root / "runs")
    return run, train_arms(run), made


def test_a_given_arm_is_measured_as_the_others_are(
    measured: Measured,
) -> None:
    run, arms, made = measured
    assert list(arms) == ["solo-seed0", "raw-seed0", "rescaled-seed0", "batch-seed0"]
    assert not len(arms["raw-seed0"].history) and len(arms["solo-seed0"].history)
    fidelity = measure.measure_arms(run, arms).set_index("arm")
    counts = measure.scan_arms(run, arms)
    tokens = {
        role: torch.cat(list(Residuals(run, role))).double().numpy()
        for role in ("scan", "calibration")
    }
    z = inputs({"normalize_activations": "layer_norm"}, tokens["scan"])
    for name in ("raw", "rescaled"):
        fires = {role: saelens_acts(*made[name], x) > 0 for role, x in tokens.items()}
        alive = fires["calibration"].any(0)
        np.testing.assert_array_equal(counts[f"{name}-seed0"].n1, fires["scan"].sum(0) * alive)
        config, weights = made[name]
        muted = weights | {"W_dec": weights["W_dec"] * alive[:, None]}
        z_hat = (saelens_output(config, muted, tokens["scan"]) - z[1]) / z[2]
        row = fidelity.loc[f"{name}-seed0"]
        errors, spread = (z_hat - z[0]) ** 2, (z[0] - z[0].mean(0)) ** 2
        assert row.l2 == pytest.approx(errors.mean(), rel=1e-4)
        assert row.fvu == pytest.approx(errors.sum() / spread.sum(), rel=1e-4)
        assert row.l0_threshold == pytest.approx((fires["scan"] & alive).sum(1).mean(), rel=1e-6)
        assert row.dead == (~alive).sum()
    assert fidelity.l0_batch["batch-seed0"] == 5
    assert np.isfinite(fidelity[["ce", "l2_batch"]]).all(axis=None)


def test_other_stages_take_a_given_arm(
    measured: Measured,
) -> None:
    run, arms, _ = measured
    assert list(load_arms(run)) == list(arms)
    counts = measure.scan_arms(run, arms)
    replicates = measure.resampled_mean_abs(run, counts)
    assert all(np.isfinite(each).all() for each in replicates.values())
    cross = cross_scan(run, arms, [("solo-seed0", "raw-seed0")])["solo-seed0", "raw-seed0"]
    assert cross.n11.shape == (256, N)
    np.testing.assert_array_equal(cross.n1_b, counts["raw-seed0"].n1)
    same = measure.same_features(run, arms).set_index("comparison")
    assert 0 < same.cosine["raw-seed0 and a solo"] < 1
    contexts = collect_contexts(run, arms, window=8)
    assert contexts["raw-seed0"].n_features == N and contexts["raw-seed0"].n_firing.any()
    fidelity = measure.measure_arms(run, arms)
    joint = fidelity[:1].assign(arm="j", kind="joint", lambda2=0.3, sigma_sq=1.0)
    table = rivals(run, pd.concat([fidelity, joint])).set_index("against")
    assert table.base_arm["raw"] == "raw-seed0" and table.joint_arm["raw"] == "j"


def test_an_exported_arm_comes_back_as_it_was(
    root: Path,
    measured: Measured,
    tmp_path: Path,
) -> None:
    run, arms, _ = measured
    folders = measure.export_arms(run, arms, tmp_path)
    assert [folder.name for folder in folders] == list(arms)
    config = json.loads((tmp_path / "solo-seed0" / "cfg.json").read_text())
    row = measure.measure_arms(run, arms).set_index("arm").loc["solo-seed0"]
    known = {key: config["metadata"][key] for key in ("l0", "dead", "l2", "fvu")}
    assert known == {"l0": row.l0_threshold, "dead": row.dead, "l2": row.l2, "fvu": row.fvu}
    sae = arms["solo-seed0"].sae
    back = load_given(profile_with(root, back=tmp_path / "solo-seed0"), "back")
    z = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back.encode_threshold(z), sae.encode_threshold(z))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gated"}, "architecture gated, which does not fire"),
    "width": ({"d": 31}, "reads 31 dimensions, and the residuals of this model have 32"),
    "hook": ({"metadata": {"hook_name": "blocks.3.hook_resid_pre"}}, "trained at blocks.3"),
    "normalisation": (
        {"normalize_activations": "expected_average_only_in"}, "fold them into its weights"
    ),
    "k": ({"architecture": "batchtopk", "k": 2.5}, "its k is 2.5"),
    "shape": ({"weights": {"b_enc": np.zeros(N + 1)}}, r"no b_enc of shape \(40,\)"),
    "missing": ({"architecture": "jumprelu", "weights": {"threshold": np.zeros(1)}}, "threshold"),
    "topk": (
        {"architecture": "standard", "activation_fn_str": "topk"}, "architecture topk"
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", [*BAD, "cut", "foreign", "nan"])
def test_bad_files_are_one_sentence_before_anything_is_done(
    root: Path, tmp_path: Path, harm: str
) -> None:
    changes, message = BAD.get(harm, ({}, ""))
    saelens(tmp_path / "sae", **changes)
    path = tmp_path / "sae" / "sae_weights.safetensors"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-8])
        message = "missing or damaged"
    elif harm == "foreign":
        (tmp_path / "sae" / "cfg.json").write_text("[]")
        message = "not the configuration of a SAELens dictionary"
    elif harm == "nan":
        saelens(tmp_path / "nan", weights={"b_dec": np.full(D, np.nan)})
        (tmp_path / "nan" / "sae_weights.safetensors").rename(path)
        message = "not finite"
    run = Run.open(profile_with(root, mine=tmp_path / "sae"), tmp_path / "runs")
    with pytest.raises(DictionaryError, match=message) as raised:
        train_arms(run)
    assert "training.given.mine: " in str(raised.value) or harm == "foreign"
    assert "residuals" not in dict(run.stages())


def test_a_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre"}
    saelens(tmp_path / "sae", d=576, metadata=metadata)
    given = {"training.given": {"mine": str(tmp_path / "sae")}}
    run = Run.open(Profile.load("tiny", given), tmp_path / "runs")
    with pytest.raises(DictionaryError, match=r"on gpt2-small, and model\.source is emb"):
        train_arms(run)


def test_profiles_name_what_is_there(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    for given, message in (
        ({"solo": str(tmp_path / "sae")}, "'solo', which is a kind of arm"),
        ({"mine": str(tmp_path)}, "training.given.mine names the folder .* no cfg.json"),
        ({"a b": str(tmp_path / "sae")}, "training.given"),
    ):
        with pytest.raises(ProfileError, match=message):
            Profile.load("tiny", {"training.given": given})


def blocks(language: str) -> list[str]:
    page = (Path(__file__).parents[1] / "book" / "saelens.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def test_the_lines_of_the_page_do_what_it_says(
    root: Path, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arms, _ = measured
    monkeypatch.chdir(tmp_path)
    ours, theirs = blocks("python")
    lines = ours.replace('Profile.load("tiny")', "profile").replace('"runs"', "runs")
    exec(lines, {"profile": run.profile, "runs": run.runs_dir})
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == sorted(arms)
    compile(theirs, "page", "exec")  # `make roundtrip` runs it in SAELens
    (given,) = (yaml.safe_load(block)["training"]["given"] for block in blocks("yaml"))
    profile = profile_with(root, **dict.fromkeys(given, tmp_path / "exported" / "solo-seed0"))
    assert [arm.name for arm in profile.arms()] == ["solo-seed0", "mine-seed0"]
