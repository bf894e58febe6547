"""Dictionaries that were trained elsewhere: SAELens' files as arms of a profile, `training.given`.

A SAELens dictionary has the pre-activations (u - a b_dec) W_enc + b_enc with a = 0 or 1, and fires
where they are above zero and, for `jumprelu`, above its thresholds. It is brought exactly:

- a = 0 is what b_enc + b_dec W_enc gives for a = 1;
- lengths of decoder rows go into W_enc, b_enc and the thresholds, so that rows have length 1;
- u, the inputs, are the residuals in one of the spaces of `dictionary.enter`.

`batchtopk` is calibrated like an arm that was trained here; `jumprelu` and `standard` (thresholds
of zero) keep what they have. Other architectures and inputs are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from metasae_lib.study import DictionaryError, Profile, Run
from metasae_lib.study.files import content_hash, local_path
from metasae_lib.subject.model import subject_of
from metasae_lib.train.dictionary import SPACES, BatchTopK, Dictionary, JumpReLU

_KINDS: dict[str, type[Dictionary]] = {
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "standard": JumpReLU,
}
_FILES = _CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Before 6.0 SAELens wrote less, and whether inputs were scaled as a truth value.
_DEFAULTS = {
    "architecture": "standard",
    "normalize_activations": "none",
    "apply_b_dec_to_input": True,
    "rescale_acts_by_decoder_norm": True,
}
_OLD_SPACES = {None: "none", False: "none", True: "expected_average_only_in"}
_UNIT = 1e-3  # by how much the length of a decoder row may differ from 1


def check_given(run: Run) -> None:
    """Look at every file of `training.given`, without its weights.

    DictionaryError for what cannot be read, does not fit the profile's model and layer, or cannot
    be brought exactly.
    """
    for name in run.profile.training.given:
        folder, shape = _folder(run.profile, name), run.profile.shape
        d_in = subject_of(run).d_model if shape is None else shape.d_model
        for problem in _problems(run.profile, folder, d_in):
            raise DictionaryError(f"training.given.{name}: {problem}")


def given_files(profile: Profile, name: str) -> dict[str, str]:
    """Hashes of a dictionary's files, for keys."""
    return {file: content_hash(_folder(profile, name) / file) for file in _FILES}


def load_given(profile: Profile, name: str) -> Dictionary:
    """A dictionary that `check_given` has passed, as one of ours. DictionaryError for weights that
    cannot be brought."""
    folder = _folder(profile, name)
    config, weights = _config(folder), load_file(folder / _WEIGHTS)
    weights = {key: value.float() for key, value in weights.items()}
    W_enc, W_dec, b_dec, b_enc = (weights[key] for key in ("W_enc", "W_dec", "b_dec", "b_enc"))
    length, kind = W_dec.norm(dim=1), _KINDS[config["architecture"]]
    finite = all(bool(each.isfinite().all()) for each in (W_enc, W_dec, b_dec, b_enc))
    if not finite or not bool((length > 0).all()):
        raise DictionaryError(
            f"training.given.{name}: {folder / _WEIGHTS} has values that are not finite, or "
            f"decoder rows of zeros: no direction can be compared with them"
        )
    chooses_by_length = kind is BatchTopK and not config["rescale_acts_by_decoder_norm"]
    if chooses_by_length and float((length - 1).abs().max()) > _UNIT:
        raise DictionaryError(
            f"training.given.{name}: its decoder rows are not of length 1, and it chooses features "
            f"without regard to that: save it with save_inference_model, which gives it thresholds"
        )
    sae = kind(config["d_in"], len(W_dec), int(config.get("k", 1)))
    sae.space = config["normalize_activations"]
    sae.W_enc.data = (W_enc.T * length[:, None]).contiguous().T
    sae.W_dec.data, sae.b_dec.data = W_dec / length[:, None], b_dec
    sae.b_enc = b_enc * length
    if not config["apply_b_dec_to_input"]:
        sae.b_enc = (sae.b_enc + b_dec.double() @ sae.W_enc.double()).float()
    if kind is JumpReLU:  # nothing below zero fires
        sae.threshold = weights.get("threshold", torch.zeros(1)).clamp(min=0) * length
    return sae


def _folder(profile: Profile, name: str) -> Path:
    return local_path(profile.training.given[name])


def _config(folder: Path) -> dict[str, Any]:
    """`cfg.json` with its metadata beside the rest, as before SAELens 6.0."""
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {**_DEFAULTS, **config, **(config.get("metadata") or {})}
        sizes = {key: int(config[key]) for key in ("d_in", "d_sae")}
        space = config["normalize_activations"]
        sizes["normalize_activations"] = _OLD_SPACES.get(space, space)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DictionaryError(f"{path} is not the configuration of a SAELens dictionary") from None
    activation = config.get("activation_fn_str", "relu")
    if activation != "relu":  # an architecture of its own since 6.0
        config["architecture"] = activation
    return {**config, **sizes}


def _problems(profile: Profile, folder: Path, d_in: int) -> Iterator[str]:
    """Sentences on what keeps a dictionary from being brought, the first most telling."""
    config, layer = _config(folder), profile.model.layer
    architecture, space = config["architecture"], config["normalize_activations"]
    if architecture not in _KINDS:
        yield (
            f"{folder} holds a dictionary of the architecture {architecture}, which does not fire "
            f"by thresholds: give one of {', '.join(_KINDS)}"
        )
    known = config.get("model_name")
    if known and not profile.model.source.startswith("folder:"):
        theirs, ours = _short(known), _short(profile.model.source)
        if theirs != ours:
            yield f"it was trained on {known}, and model.source is {profile.model.source}"
    hooks = [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer - 1}.hook_resid_post"]
    hook = config.get("hook_name") or hooks[0]
    if hook not in hooks:
        yield f"it was trained at {hook}, and model.layer {layer} is {' or '.join(hooks)}"
    if config["d_in"] != d_in:
        yield f"it reads {config['d_in']} dimensions, and the residuals of this model have {d_in}"
    if space not in SPACES:
        yield (
            f"its inputs were normalised by {space}, with factors that its files do not hold: fold "
            f"them into its weights in SAELens and save it again"
        )
    n, k = config["d_sae"], config.get("k", 1)
    if k != int(k) or not 1 <= k <= n:
        yield f"its k is {k}: a whole number from 1 to {n} is needed"
    wanted = {"W_enc": (d_in, n), "W_dec": (n, d_in), "b_dec": (d_in,), "b_enc": (n,)}
    if architecture == "jumprelu":
        wanted["threshold"] = (n,)
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception:  # safetensors raises types of its own on a cut or foreign file
        yield f"{folder / _WEIGHTS} is missing or damaged: copy it again"
        return
    for key, shape in wanted.items():
        if shapes.get(key) != shape:
            yield f"{folder / _WEIGHTS} has no {key} of shape {shape}: save it again in SAELens"


def _short(model: str) -> str:
    """A language model's name without owner, revision and capitals."""
    return re.split("[:/]", model)[-1].partition("@")[0].lower().removesuffix("-small")
