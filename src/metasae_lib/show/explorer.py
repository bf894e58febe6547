"""The feature explorer: a static page over the features of every arm.

The page and its scripts are `book/explorer/`; this module writes the data beside them. They are
script files that hand over deflated JSON text, because a page opened from disk may not fetch: an
index per arm for search and filters, and blocks of features with their contexts, loaded when one
is opened.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.measure.counting import Counts, CrossCounts
from metasae_lib.measure.cross import cross_scan, top_matches
from metasae_lib.measure.matching import hungarian
from metasae_lib.measure.phi import phi
from metasae_lib.measure.scan import scan_arms
from metasae_lib.study.errors import MeasureError
from metasae_lib.study.files import atomic_write
from metasae_lib.study.profile import repository_folders
from metasae_lib.study.run import Run

if TYPE_CHECKING:
    from metasae_lib.train.training import Arm


MAX_FILE_BYTES = 3 * 2**20
_PART = 4096  # features in a part of the index
_BLOCK = 64  # features in a block of cards
_PAGE = ("index.html", "explorer.css", "explorer.js")
_COLUMNS = ("rate", "max", "fuzz", "explanation", "partner", "phi", "second")
_TOKENS = 5  # shown for a feature in the index
_PEAKS = 10  # strongest segments whose peaks name a feature
_BINS = 20
_NEAR, _CROSS = 8, 5  # neighbours shown within the arm, and in the other one


@dataclass(frozen=True)
class Context:
    """One stretch of text: its tokens as text, and the feature's activation on each (0: none)."""

    pieces: Sequence[str]
    acts: Sequence[float]


@dataclass(frozen=True)
class ArmPage:
    """What the explorer shows of one arm with n features.

    features: n rows in the order of the features with columns rate (per token), max (largest
    activation), threshold, fuzz, explanation, partner (matched feature of the arm `other`), cosine
    and phi (with that partner), second (φ with the second strongest feature of `other`); nan or
    None where there is none. tokens: those on which each feature is strongest. histograms: counts
    of its activations in equal bins from 0 to max. near and cross: (feature, φ) pairs, strongest
    first, within the arm and in `other`. contexts: strongest first.
    """

    name: str
    title: str
    other: str | None
    features: pd.DataFrame
    tokens: Sequence[Sequence[str]]
    histograms: Sequence[Sequence[int]] | NDArray[np.int64]
    near: Sequence[Sequence[tuple[int, float]]]
    cross: Sequence[Sequence[tuple[int, float]]]
    contexts: Sequence[Sequence[Context]]


def peak_tokens(contexts: Contexts) -> list[list[str]]:
    """The tokens on which each feature is strongest, the most telling first; [] for silent ones.

    Of the strongest segments, each gives its peak token the segment's strength as weight.
    """
    found = []
    for feature in range(contexts.n_features):
        weight: Counter[str] = Counter()
        for example in contexts.top(feature, _PEAKS):
            weight[example.pieces[example.peak]] += example.strength  # type: ignore[assignment]
        found.append([token for token, _ in weight.most_common(_TOKENS)])
    return found


def collect(
    run: Run,
    arms: Mapping[str, Arm],
    contexts: Mapping[str, Contexts],
    main: tuple[str, str],
    explanations: pd.DataFrame | None = None,
    n_contexts: tuple[int, int] = (6, 2),
) -> Iterator[ArmPage]:
    """Everything that the explorer shows of the arms with contexts, `main` (solo, joint) first, one
    by one.

    Every arm is matched with the solo arm of `main`, and that one with the joint arm. Arms with
    the same weights as an earlier one are left out: a control at λ₂ = 0 is the solo arm again.
    explanations: columns arm, feature, explanation, fuzz, where there are any. n_contexts: shown
    for a feature of the two main arms, and of the others.
    """
    names: list[str] = []
    for name in [*main, *(name for name in contexts if name not in main)]:
        if not any(torch.equal(arms[name].sae.W_dec, arms[other].sae.W_dec) for other in names):
            names.append(name)
    others = {name: main[1] if name == main[0] else main[0] for name in names}
    counts = scan_arms(run, {name: arms[name] for name in names})
    cross = cross_scan(run, arms, list(others.items()))
    for name in names:
        tokens = peak_tokens(contexts[name])
        shown = n_contexts[name not in main]
        yield ArmPage(
            name=name,
            title=name,
            other=others[name],
            features=_features(
                name, arms[name], arms[others[name]], counts[name], contexts[name],
                cross[name, others[name]], explanations,
            ),
            tokens=tokens,
            histograms=[_histogram(contexts[name], i) for i in range(len(tokens))],
            near=_neighbours(_within(counts[name]), _NEAR, itself=True),
            cross=_neighbours(cross[name, others[name]], _CROSS),
            contexts=[
                [Context(e.pieces, e.acts) for e in contexts[name].top(i, shown)]
                for i in range(len(tokens))
            ],
        )  # fmt: skip


def _features(
    name: str,
    arm: Arm,
    other: Arm,
    counts: Counts,
    contexts: Contexts,
    cross: CrossCounts,
    explanations: pd.DataFrame | None,
) -> pd.DataFrame:
    n = len(counts.n1)
    rows, partners, cosines = hungarian(arm.sae.W_dec, other.sae.W_dec)
    frame = pd.DataFrame(
        {
            "rate": counts.rates,
            "max": [_largest(contexts.activations(i)) for i in range(n)],
            "threshold": arm.sae.threshold.cpu() if arm.sae.threshold is not None else np.nan,
            "partner": pd.Series(partners, rows, float),
            "cosine": pd.Series(cosines, rows),
            "phi": pd.Series(_phi_at(cross, rows, partners), rows),
        }
    )
    matches = top_matches(cross, 2)
    frame["second"] = matches[matches["rank"] == 1].set_index("feature").phi
    told = pd.DataFrame({"feature": [], "explanation": [], "fuzz": []})
    if explanations is not None:
        told = explanations[explanations.arm == name]
    told = told.drop_duplicates("feature").set_index("feature")[["explanation", "fuzz"]]
    return frame.join(told)


def _largest(values: NDArray[Any]) -> float:
    return float(values.max()) if len(values) else np.nan


def _phi_at(cross: CrossCounts, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float64]:
    values = [
        phi(cross.n11[[[i]], [[j]]], cross.n1_a[[i]], cross.n1_b[[j]], cross.n_tokens)[0, 0]
        for i, j in zip(rows, columns, strict=True)
    ]
    return np.array(values)


def _within(counts: Counts) -> CrossCounts:
    return CrossCounts(counts.n11, counts.n1, counts.n1, counts.n_tokens)


def _neighbours(
    cross: CrossCounts, count: int, itself: bool = False
) -> list[list[tuple[int, float]]]:
    """The (feature, φ) pairs with the largest |φ| of every feature, strongest first."""
    found = top_matches(cross, count + itself)
    if itself:
        found = found[found.feature != found.match]
    near: list[list[tuple[int, float]]] = [[] for _ in cross.n1_a]
    for feature, match, value in zip(found.feature, found.match, found.phi, strict=True):
        if len(near[feature]) < count:
            near[feature].append((int(match), float(value)))
    return near


def _histogram(contexts: Contexts, feature: int) -> list[int]:
    values = contexts.activations(feature)
    if not len(values):
        return []
    return [int(n) for n in np.histogram(values, _BINS, (0, float(values.max())))[0]]


def write(
    folder: Path, arms: Iterable[ArmPage], profile: str, about: str, back: str
) -> dict[str, int]:
    """Write the whole explorer into `folder`, from nothing.

    arms: in the order of the menu, the first is shown first; one at a time is held in memory. back:
    address of the page that leads here, seen from `folder`. Returns the size in bytes of every
    file. MeasureError for an arm whose parts differ in length or whose partner is not there, or a
    file above 3 MiB.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = next((f / "explorer" for f in repository_folders("book")), None)
    if source is None:
        raise MeasureError("the folder book/explorer is not here or above: run in the repository")
    for name in _PAGE:
        shutil.copyfile(source / name, folder / name)
    listed: list[dict[str, Any]] = []
    for arm in arms:
        _check(arm)
        listed.append(
            {
                "name": arm.name,
                "title": arm.title,
                "other": arm.other,
                "parts": math.ceil(len(arm.tokens) / _PART),
                "block": _BLOCK,
                "alive": int((arm.features.rate > 0).sum()),
            }
        )
        columns = _index(arm)
        for part, start in enumerate(range(0, len(arm.tokens), _PART)):
            cut = {name: values[start : start + _PART] for name, values in columns.items()}
            _write(folder, f"{arm.name}/index-{part}", cut)
        cards = _cards(arm)
        for block in range(math.ceil(len(arm.tokens) / _BLOCK)):
            features = [next(cards) for _ in range(min(_BLOCK, len(arm.tokens) - block * _BLOCK))]
            _write(folder, f"{arm.name}/block-{block}", {"features": features})
    names = {arm["name"] for arm in listed}
    for one in listed:
        if one["other"] not in names | {None}:
            raise MeasureError(
                f"{one['name']} is matched with {one['other']}, which is not in the explorer"
            )
    _write(folder, "site", {"profile": profile, "about": about, "back": back, "arms": listed})
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _check(arm: ArmPage) -> None:
    n = len(arm.features)
    parts = (arm.tokens, arm.histograms, arm.near, arm.cross, arm.contexts)
    if any(len(part) != n for part in parts):
        raise MeasureError(f"{arm.name} has {n} features, but its parts differ: give one for each")


def _index(arm: ArmPage) -> dict[str, list[Any]]:
    columns = {name: [_short(v) for v in arm.features[name]] for name in _COLUMNS}
    columns["partner"] = [None if v is None else int(v) for v in columns["partner"]]
    return {"tokens": [list(tokens[:_TOKENS]) for tokens in arm.tokens], **columns}


def _cards(arm: ArmPage) -> Iterator[dict[str, Any]]:
    rows = zip(
        arm.features.threshold, arm.features.cosine, arm.features["max"], arm.histograms,
        arm.near, arm.cross, arm.contexts, strict=True,
    )  # fmt: skip
    for threshold, cosine, largest, histogram, near, cross, contexts in rows:
        yield {
            "threshold": _short(threshold),
            "cosine": _short(cosine),
            "histogram": [int(count) for count in histogram],
            "near": [[int(i), _short(value)] for i, value in near],
            "cross": [[int(i), _short(value)] for i, value in cross],
            "contexts": [_marked(context, largest) for context in contexts],
        }


def _marked(context: Context, largest: float) -> list[Any]:
    """[text, [[start, end, strength], ...]]: positions in characters, strength 1-9 of `largest`."""
    spans, start = [], 0
    for piece, act in zip(context.pieces, context.acts, strict=True):
        end = start + len(piece)
        if act > 0:
            strength = min(max(round(9 * act / largest), 1), 9) if largest > 0 else 1
            spans.append([start, end, strength])
        start = end
    return ["".join(context.pieces), spans]


def _short(value: Any) -> Any:
    """Words as they are, numbers with four significant digits, what is missing as None."""
    if value is None or isinstance(value, str):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _write(folder: Path, name: str, value: object) -> None:
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(zlib.compress(text.encode(), 9, wbits=-zlib.MAX_WBITS)).decode()
    script = f'METASAE_DATA({json.dumps(name)},"{packed}")\n'
    if len(script.encode()) > MAX_FILE_BYTES:
        raise MeasureError(f"data/{name}.js is above 3 MiB: show fewer or shorter contexts")
    with atomic_write(path) as temporary:
        temporary.write_text(script, encoding="utf-8")
