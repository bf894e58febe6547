"""Profiles: what to study, as one validated page of YAML.

A profile is read from `profiles/<name>.yml`, changed by overrides under dotted keys, and checked
as a whole. Whatever is wrong becomes one `ProfileError` sentence before any download or compute.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from metasae_lib.study import sections
from metasae_lib.study.arms import ArmSpec, arms_by_kind
from metasae_lib.study.errors import ProfileError, first_line
from metasae_lib.study.files import local_path, matching_files, repository_folders
from metasae_lib.study.known import (
    EMBEDDED_TOKENS,
    MODELS,
    SHAPES,
    WORLDS,
    EncoderModel,
    ModelShape,
    model_shape,
)
from metasae_lib.study.sections import ROLE_SHARES, ROLES

# One number of tokens serves both tokenizers of embedded text, so a tenth is held back: a profile
# that passes here is one that the corpus can fill.
_EMBEDDED_MARGIN = 0.9


# What a profile of a synthetic world need not say: it has no language model and no text.
_SYNTHETIC: dict[str, Any] = {
    "model": {"layer": 1, "dtype": "float32", "weights": "as_trained", "batch_rows": 1},
    "text": {
        "source": "synthetic", "context_length": 16, "bos": "none", "skip_first": False,
        "roles": dict.fromkeys(ROLES, 16),
    },
    "activations": {"cache": False, "chunk_rows": 1},
    "evaluation": {"threshold_rule": "rate", "ce_rows": 1, "bootstrap": 1},
}  # fmt: skip

# What runs and the book have beside the folders of profiles.
_TAKEN = {"artefacts", "explorer", "generated", "mathjax", "scale", "together"}
_TAKEN_ENDINGS = {".bib", ".csv", ".html", ".inv", ".js", ".md", ".yml"}


class Profile(sections.Section):
    """A validated profile; sections are attributes, as in `profile.model.layer`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str
    model: sections.Model
    text: sections.Text
    activations: sections.Activations
    dictionary: sections.Dictionary
    training: sections.Training
    evaluation: sections.Evaluation
    autointerp: sections.Autointerp = sections.Autointerp()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    _overrides: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(
        cls, name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
    ) -> Profile:
        """Read a profile by name (`profiles/<name>.yml`) or path, and apply overrides.

        A profile may give only what differs from another, which its key `base` names.
        `overrides` maps dotted keys to values: `{"training.lambda2": [0.3]}`. Those that repeat
        the profile's own value change nothing. Raises `ProfileError`, one sentence, on anything
        wrong in the file, in the overrides, or in how they fit together.
        """
        path = _find(name_or_path)
        values = _read(path)
        base = _validate(values, path.stem)
        if base.name != path.stem:
            raise ProfileError(
                f"name is '{base.name}' but the file is {path.name}: "
                f"rename one, so that a run and its profile have the same name"
            )
        if overrides is None:
            return base
        keys = _override(values, overrides)
        changed = _validate(values, path.stem)
        old, new = base.model_dump(), changed.model_dump()
        changed._overrides = {
            key: _at(new, key) for key in sorted(keys) if _at(new, key) != _at(old, key)
        }
        return changed

    @classmethod
    def of(cls, values: dict[str, Any], name: str) -> Profile:
        """A profile out of its values, as a run keeps them. Raises `ProfileError`."""
        return _validate(values, name)

    @property
    def overrides(self) -> dict[str, Any]:
        """The overrides that changed something, by dotted key."""
        return dict(self._overrides)

    @property
    def overrides_hash(self) -> str:
        """Eight hex digits that name the overrides; empty without any."""
        return _hash(self._overrides)[:8] if self._overrides else ""

    @property
    def hash(self) -> str:
        """Sixteen hex digits of all that results depend on: `about` and `device` are left out."""
        return _hash(self.model_dump(exclude={"about", "device"}))[:16]

    @property
    def shape(self) -> ModelShape | None:
        """The language model's shape, where it is known without a download."""
        return model_shape(self.model.source)

    @property
    def synthetic(self) -> bool:
        """Whether it studies a world of known atoms (`text.roles.scan`: samples held out)."""
        return self.model.source.startswith("synthetic:")

    @property
    def steps(self) -> int:
        """Primary training steps of every arm."""
        return self.training.train_tokens // self.training.batch_tokens

    @property
    def selected(self) -> tuple[float, float]:
        """(λ₂, σ²) of the headline: `training.selected`, or the grid's first if not in it."""
        lambda2, sigma_sq = self.training.selected
        if lambda2 in self.training.lambda2 and sigma_sq in self.training.sigma_sq:
            return lambda2, sigma_sq
        return self.training.lambda2[0], self.training.sigma_sq[0]

    @property
    def prefixes(self) -> list[int]:
        """Features of each prefix of a Matryoshka dictionary; prefixes of one size are one."""
        n = self.dictionary.n_features
        return sorted({max(1, round(share * n)) for share in self.training.matryoshka_prefixes})

    def arms(self) -> list[ArmSpec]:
        """Every arm of the profile, in the order of `training.arms`, then those of `given`."""
        known = arms_by_kind(self)
        # An arm that two kinds ask for is one arm.
        trained = dict.fromkeys(arm for kind in self.training.arms for arm in known[kind])
        return [*trained, *(ArmSpec(name, self.training.seeds[0]) for name in self.training.given)]

    @model_validator(mode="after")
    def _fits_together(self) -> Profile:
        """What no single key can show. A `ProfileError` passes through pydantic as it is."""
        for problem in _problems(self):
            raise ProfileError(f"profile {self.name}: {problem}")
        return self


_LIMITS = {
    "dictionary.k": "dictionary.n_features",
    "dictionary.meta_k": "dictionary.n_meta_features",
    "training.k_aux": "dictionary.n_features",
    "autointerp.window": "text.context_length",
}


def _problems(profile: Profile) -> Iterable[str]:
    """Sentences on keys that do not fit each other or the world, the first most telling."""
    model, text, training = profile.model, profile.text, profile.training
    if profile.name.lower() in _TAKEN or Path(profile.name).suffix.lower() in _TAKEN_ENDINGS:
        yield f"name is '{profile.name}', which runs or the book have for themselves: change it"
    kind, _, place = model.source.partition(":")
    if kind == "embedded" and model.source not in SHAPES:
        known = [source for source in SHAPES if source.startswith("embedded:")]
        yield f"model.source is '{model.source}'; choose one of {', '.join(known)}"
    if kind == "synthetic" and place not in WORLDS:
        yield f"model.source is '{model.source}'; the worlds are {', '.join(WORLDS)}"
    if profile.synthetic != (text.source == "synthetic"):
        yield "model.source and text.source are both synthetic, or neither: change one"
    if kind == "folder" and not os.path.isfile(local_path(place) / "config.json"):
        yield f"model.source names the folder {place}, which holds no config.json of a model"
    shape = profile.shape
    if shape is not None and model.layer > shape.n_layers - 1:
        yield (
            f"model.layer is {model.layer}, but {place} has {shape.n_layers} layers: "
            f"choose 1 to {shape.n_layers - 1}"
        )

    auto = profile.autointerp
    for key, source in auto.models.items():
        kind, _, place = source.partition(":")
        encodes = key == "model" and auto.judge == "embedding"
        known = [n for n, m in MODELS.items() if isinstance(m, EncoderModel) == encodes]
        if kind not in ("embedded", "hub", "folder") or (kind == "embedded" and place not in known):
            yield (
                f"autointerp.{key} is '{source}': choose hub:<owner/name>, folder:<path>, or one "
                f"of {', '.join(f'embedded:{name}' for name in known)}"
            )
    if auto.explainer == "judge" and auto.judge == "embedding":
        yield (
            "autointerp.explainer is judge, but the embedding judge writes no explanations: set it "
            "to lexical, in-process or http"
        )
    for role in ROLES:
        if role not in text.roles:
            yield f"text.roles.{role} is missing"
        if text.roles[role] < text.kept_per_row:
            yield (
                f"text.roles.{role} is {text.roles[role]} tokens, less than one row "
                f"({text.kept_per_row}): raise it"
            )
    if text.source == "embedded":
        for package in text.max_share:
            if package not in EMBEDDED_TOKENS:
                yield (
                    f"text.max_share.{package} is no embedded package; "
                    f"the nearest is text.max_share.{nearest(package, EMBEDDED_TOKENS)}"
                )
        held = sum(within_shares(EMBEDDED_TOKENS, text.max_share).values()) * _EMBEDDED_MARGIN
        for role, wanted in text.roles.items():
            if wanted > held * ROLE_SHARES[role]:
                yield (
                    f"text.roles.{role} asks for {wanted:,} tokens, but the embedded text holds "
                    f"about {int(held * ROLE_SHARES[role]):,} for it under text.max_share: "
                    f"lower it or choose another text.source"
                )
    elif text.max_share:
        yield "text.max_share applies to the embedded text only: write {} for other sources"
    kind, _, given = text.source.partition(":")
    if kind == "files" and not matching_files(given):
        yield f"text.source is '{text.source}', and no file is there ({local_path(given)})"

    for key, limit in _LIMITS.items():
        value, most = attrgetter(key, limit)(profile)
        if value > most:
            yield f"{key} is {value}, more than {limit} ({most})"
    if training.train_tokens < training.batch_tokens:
        yield (
            f"training.train_tokens is {training.train_tokens}, less than one batch "
            f"(training.batch_tokens is {training.batch_tokens})"
        )
    kinds = arms_by_kind(profile)
    for arm in training.arms:
        if arm not in kinds:
            yield (
                f"training.arms has the unknown kind '{arm}'; "
                f"the nearest is '{nearest(arm, kinds)}'"
            )
    for name, place in training.given.items():
        if name in kinds:
            yield f"training.given has '{name}', which is a kind of arm: give it another name"
        if not os.path.isfile(local_path(place) / "cfg.json"):
            yield (
                f"training.given.{name} names the folder {place}, which holds no cfg.json of a "
                f"SAELens dictionary"
            )
    if "frontier" in training.arms:
        k = profile.dictionary.k
        if min(training.frontier, default=k) >= k or k in training.frontier:
            yield (
                f"training.arms has 'frontier': give training.frontier one or more k below "
                f"dictionary.k ({k}), and not that one again, not {training.frontier}"
            )
    shares = training.matryoshka_prefixes
    if shares != sorted(shares) or shares[-1] != 1:
        yield (
            f"training.matryoshka_prefixes is {shares}: give ascending shares of the features, "
            f"the last 1"
        )
    for key in ("lambda2", "sigma_sq", "seeds", "frontier", "arms", "meta_posthoc"):
        values = getattr(training, key)
        # Arms are named with six digits, so values that agree in those would share a name.
        shown = [value if isinstance(value, str) else f"{value:g}" for value in values]
        twice = [value for value in shown if shown.count(value) > 1]
        if twice:
            yield f"training.{key} has {twice[0]} twice"

    rows = text.roles["scan"] // text.kept_per_row
    if profile.evaluation.ce_rows > rows:
        yield (
            f"evaluation.ce_rows is {profile.evaluation.ce_rows}, more than the {rows} rows of "
            f"text.roles.scan"
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of some dotted keys, by the whole key or by its last part."""

    def similarity(other: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, word, other).ratio()
        last = SequenceMatcher(None, word.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, last), whole

    return max(known, key=similarity)


def within_shares(sizes: Mapping[str, int], max_share: Mapping[str, float]) -> dict[str, float]:
    """As much of each source's size as keeps it within its share of what is kept in all."""
    total, limits = 0.0, {source: float(size) for source, size in sizes.items()}
    while abs(total - sum(limits.values())) > 0.5:
        # What one source loses lowers the total, and with it the limits of the others.
        total = sum(limits.values())
        limits = {name: min(size, max_share.get(name, 1) * total) for name, size in sizes.items()}
    return limits


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    given = os.fspath(name_or_path)
    if given.endswith((".yml", ".yaml")) or os.sep in given:
        if not Path(given).is_file():
            raise ProfileError(f"there is no profile file {given}")
        return Path(given)
    found: dict[str, Path] = {}
    for folder in repository_folders("profiles"):
        for path in sorted(folder.glob("*.yml")):
            found.setdefault(path.stem, path)
    if given in found:
        if alike := [name for name in found if name.lower() == given.lower() and name != given]:
            raise ProfileError(
                f"the profiles {given} and {alike[0]} differ in capitals alone, which the book "
                f"does not tell apart: rename one"
            )
        return found[given]
    why = ": no folder 'profiles' is here or above; give a path"
    if found:
        why = f"; the nearest is '{nearest(given, found)}' (of {', '.join(found)})"
    raise ProfileError(f"there is no profile '{given}'{why}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} is written twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ProfileError(f"{path} is not valid YAML at line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not valid YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path} is not a profile: it holds no keys")
    base = values.pop("base", None)
    return values if base is None else _merged(_read(path.with_name(f"{base}.yml")), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values of a base with some changed, section by section."""
    both = base | changes
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = _merged(base[key], changes[key])
    return both


def _known_keys() -> list[str]:
    """Dotted keys of the leaves, roles included."""
    keys = []
    for name, field in Profile.model_fields.items():
        inside = getattr(field.annotation, "model_fields", ())
        keys += [f"{name}.{key}" for key in inside] or [name]
    roles = keys.index("text.roles")
    return [*keys[:roles], *(f"text.roles.{role}" for role in ROLES), *keys[roles + 1 :]]


def _override(values: dict[str, Any], overrides: object, prefix: str = "") -> list[str]:
    """Set dotted keys in the raw profile; returns them. A mapping for a section is opened."""
    if not isinstance(overrides, Mapping):
        raise ProfileError(
            "overrides must map dotted keys to values, as {'training.lambda2': [0.3]}; "
            "on papermill's command line give them with -y or -f, not with -p"
        )
    known, keys = _known_keys(), []
    for part, value in overrides.items():
        key = f"{prefix}{part}"
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside and isinstance(value, Mapping):
            keys += _override(values, value, f"{key}.")
            continue
        if key == "name":
            raise ProfileError("name cannot be overridden: copy the profile to a new file instead")
        if key not in known and not key.startswith("text.max_share."):
            wrong = "is a section, not a key" if inside else "is not a known key"
            close = inside[0] if inside else nearest(key, known)
            raise ProfileError(f"override {key} {wrong}; the nearest is {close}")
        *outer, leaf = key.split(".", 2)
        section = reduce(lambda inner, name: inner.setdefault(name, {}), outer, values)
        section[leaf] = list(value) if isinstance(value, tuple) else value
        keys.append(key)
    return keys


def _at(values: Any, key: str) -> Any:
    return reduce(lambda inner, part: (inner or {}).get(part), key.split(".", 2), values)


def _validate(values: dict[str, Any], name: str) -> Profile:
    model = values.get("model")
    if isinstance(model, dict) and str(model.get("source")).startswith("synthetic:"):
        values = _merged(_SYNTHETIC, values)
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        # A misspelt key shows twice, as unknown and as missing: the first says more.
        worst = max(error.errors(), key=_is_unknown)
        raise ProfileError(f"profile {name}: {_sentence(worst)}") from None


def _is_unknown(detail: Any) -> bool:
    return detail["type"] == "extra_forbidden" or detail["loc"][-1] == "[key]"


def _sentence(detail: Any) -> str:
    """One of pydantic's findings, said with the dotted key."""
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if _is_unknown(detail):
        return f"{key} is not a known key; the nearest is {nearest(key, _known_keys())}"
    got, context = detail["input"], detail.get("ctx", {})
    rules: dict[str, str] = {
        "missing": "is missing",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
        "dict_type": "must be a mapping of keys to values",
        "model_type": "must be a section with keys of its own",
        "literal_error": f"must be {context.get('expected')}",
        "greater_than": f"must be above {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "too_short": f"must have at least {context.get('min_length')} items",
        "too_long": f"must have at most {context.get('max_length')} items",
    }
    forms = {
        "model.source": "must be embedded:<name>, hub:<owner/name>[@<revision>], folder:<path> "
        "or synthetic:<world>",
        "text.source": "must be embedded, hf:<dataset>[@<revision>][:<config>] or files:<path or "
        "pattern>",
        "autointerp.url": "must be http(s)://host[:port]/path without name, password or query",
        "name": "must be letters, digits, '.', '_' and '-'",
    }
    rule = rules.get(detail["type"]) or forms.get(key) or f"is wrong ({detail['msg']})"
    # An address may hold a password.
    silent = detail["type"] == "missing" or key == "autointerp.url"
    return f"{key} {rule}" if silent else f"{key} {rule}, not {got!r}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
