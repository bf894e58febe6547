"""The feature explorer: a static page over the features of every arm.

The page and its scripts are `book/explorer/`; this module writes the data beside them. They are
script files that hand over deflated JSON text, because a page opened from disk may not fetch: an
index per arm for search and filters, and blocks of features with their contexts, loaded when one
is opened.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from metasae_lib.interpret import Contexts, Example, Lens, logit_lens, splitting
from metasae_lib.measure import CrossCounts, cross_scan, hungarian, phi, scan_arms, top_matches
from metasae_lib.study import MeasureError, Run, atomic_write, repository_folders
from metasae_lib.train import Arm

MAX_FILE_BYTES = 3 * 2**20
_PART = 4096  # features in a part of the index
_BLOCK = 64  # features in a block of cards
_TEXTS = 256  # segments in a block of their texts, which the features of all arms share
_PAGE = ("index.html", "explorer.css", "explorer.js")
_COLUMNS = ("rate", "max", "fuzz", "explanation", "partner", "phi", "split")
_TOKENS = 5  # shown for a feature in the index
_NAMING = 3  # of them, beside a feature of the other arm
_PEAKS = 10  # strongest segments whose peaks name a feature
_BINS = 20
_RATE_BINS = 30
# Of a feature of the two main arms, and of the others:
_NEAR, _CROSS = (8, 5), (5, 3)  # neighbours within the arm, and in the arm it is matched with
_SHOWN = 6, 2  # contexts
_LENS = 10, 5  # tokens at either end of the lens


@dataclass(frozen=True)
class ArmPage:
    """What the explorer shows of one arm with n features.

    same: names of arms with the same weights, which are left out. features: n rows in the order of
    the features with columns rate (per token), max (largest activation), threshold, fuzz,
    explanation, partner (matched feature of the arm `other`), cosine and phi (with that partner),
    split (score of `splitting.find`, for what comes apart in `other`); nan or None where there is
    none. tokens and other_tokens: those on which each feature of the arm and of `other` is
    strongest. histograms: counts of its activations in equal bins from 0 to max. near and cross:
    (feature, φ) pairs, strongest first, within the arm and in `other`. contexts: strongest first.
    """

    name: str
    same: Sequence[str]
    other: str | None
    features: pd.DataFrame
    tokens: Sequence[Sequence[str]]
    other_tokens: Sequence[Sequence[str]]
    lens: Lens
    histograms: Sequence[Sequence[int]] | NDArray[np.int64]
    near: Sequence[Sequence[tuple[int, float]]]
    cross: Sequence[Sequence[tuple[int, float]]]
    contexts: Sequence[Sequence[Example]]


def peak_tokens(contexts: Contexts) -> list[list[str]]:
    """The tokens on which each feature is strongest, the most telling first; [] for silent ones.

    Of the strongest segments, each gives its peak token the segment's strength as weight.
    """
    found = []
    for feature in range(contexts.n_features):
        weight: defaultdict[str, float] = defaultdict(float)
        for example in contexts.top(feature, _PEAKS):
            weight[example.pieces[example.peak]] += example.strength
        found.append(sorted(weight, key=weight.__getitem__, reverse=True)[:_TOKENS])
    return found


def collect(
    run: Run,
    arms: Mapping[str, Arm],
    contexts: Mapping[str, Contexts],
    main: tuple[str, str],
    explanations: pd.DataFrame,
) -> Iterator[ArmPage]:
    """Everything that the explorer shows of the arms with contexts, `main` (solo, joint) first, one
    by one.

    Every arm is matched with the solo arm of `main`, and that one with the joint arm. Arms with
    the same weights as an earlier one are left out: a control at λ₂ = 0 is the solo arm again.
    explanations: columns arm, feature, explanation, fuzz.
    """
    same: dict[str, list[str]] = {}
    for name in dict.fromkeys((*main, *contexts)):
        twins = [n for n in same if torch.equal(arms[name].sae.W_dec, arms[n].sae.W_dec)]
        if twins:
            same[twins[0]].append(name)
        else:
            same[name] = []
    others = {name: main[1] if name == main[0] else main[0] for name in same}
    shown = {name: arms[name] for name in same}
    counts, lenses = scan_arms(run, shown), logit_lens(run, shown)
    crosses = cross_scan(run, arms, list(others.items()))
    peaks = {name: peak_tokens(contexts[name]) for name in main}
    for name, other in others.items():
        own, text, cross = counts[name], contexts[name], crosses[name, other]
        tokens = peaks.get(name) or peak_tokens(text)
        a, b = (
            splitting.Side(each, [peak[0] if peak else "" for peak in found])
            for each, found in ((own, tokens), (counts[other], peaks[other]))
        )
        splits = splitting.find(cross, a, b).drop_duplicates("feature").set_index("feature")
        activations = [text.activations(i) for i in range(own.n1.size)]
        sae, n = arms[name].sae, len(own.n1)
        rows, partners, cosines = hungarian(sae.directions, arms[other].sae.directions)
        matched = [
            phi(cross.n11[[[i]], [[j]]], cross.n1_a[[i]], cross.n1_b[[j]], cross.n_tokens).item()
            for i, j in zip(rows, partners, strict=True)
        ]
        features = pd.DataFrame(
            {
                "rate": own.rates,
                "max": [float(a.max()) if len(a) else np.nan for a in activations],
                "threshold": np.nan if sae.threshold is None else sae.threshold.cpu(),
                "partner": pd.Series(partners, rows, float),
                "cosine": pd.Series(cosines, rows),
                "phi": pd.Series(matched, rows),
                "split": splits.score,
            },
            index=range(n),
        )
        told = explanations[explanations.arm == name].drop_duplicates("feature")
        told = told.set_index("feature")[["explanation", "fuzz"]]
        fewer = name not in main
        within = top_matches(CrossCounts(own.n11, own.n1, own.n1, own.n_tokens), _NEAR[fewer] + 1)
        yield ArmPage(
            name=name,
            same=same[name],
            other=other,
            features=features.join(told),
            tokens=tokens,
            other_tokens=peaks[other],
            lens=lenses[name].first(_LENS[fewer]),
            histograms=[
                np.histogram(a, _BINS, (0, float(a.max())))[0].tolist() if len(a) else []
                for a in activations
            ],
            near=_pairs(within[within.feature != within.match], _NEAR[fewer], n),
            cross=_pairs(top_matches(cross, _CROSS[fewer]), _CROSS[fewer], n),
            contexts=[text.top(i, _SHOWN[fewer]) for i in range(n)],
        )


def _pairs(matches: pd.DataFrame, count: int, n: int) -> list[list[tuple[int, float]]]:
    """The first `count` (match, φ) of each of n features in `top_matches`."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    first = matches.groupby("feature").head(count)
    for feature, match, value in zip(first.feature, first.match, first.phi, strict=True):
        found[feature].append((match, value))
    return found


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
    texts: dict[int, list[str]] = {}
    for arm in arms:
        n = len(arm.features)
        lists = (arm.tokens, arm.lens.names, arm.histograms, arm.near, arm.cross, arm.contexts)
        if any(len(part) != n for part in lists):
            raise MeasureError(
                f"{arm.name} has {n} features, but its parts differ: give one for each"
            )
        living = np.log10(arm.features.rate[arm.features.rate > 0])
        density, ends = np.histogram(living, _RATE_BINS)
        about_arm = {
            "name": arm.name,
            "same": list(arm.same),
            "other": arm.other,
            "parts": math.ceil(n / _PART),
            "block": _BLOCK,
            "alive": len(living),
            "density": density.tolist(),  # features by the logarithm of their rate
            "rates": [_short(10**end) for end in (ends[0], ends[-1])],
        }
        listed.append(about_arm)
        columns: dict[str, list[Any]] = {
            "tokens": [list(tokens[:_TOKENS]) for tokens in arm.tokens]
        }
        columns |= {name: [_short(v) for v in arm.features[name]] for name in _COLUMNS}
        columns["partner"] = [None if v is None else int(v) for v in columns["partner"]]
        for part, start in enumerate(range(0, n, _PART)):
            cut = {name: values[start : start + _PART] for name, values in columns.items()}
            _write(folder, f"{arm.name}/index-{part}", cut)
        cards = _cards(arm)
        for block in range(math.ceil(n / _BLOCK)):
            features = list(itertools.islice(cards, _BLOCK))
            _write(folder, f"{arm.name}/block-{block}", {"features": features})
        new = (c for shown in arm.contexts for c in shown if c.segment not in texts)
        texts.update((c.segment, [c.text, c.origin]) for c in new)
    names = {arm["name"] for arm in listed}
    for name, other in ((one["name"], one["other"]) for one in listed):
        if other not in names | {None}:
            raise MeasureError(f"{name} is matched with {other}, which is not in the explorer")
    for block in {segment // _TEXTS for segment in texts}:
        numbers = range(block * _TEXTS, (block + 1) * _TEXTS)
        _write(folder, f"texts-{block}", {"texts": [texts.get(number) for number in numbers]})
    about_all = {"profile": profile, "about": about, "back": back, "texts": _TEXTS, "arms": listed}
    _write(folder, "site", about_all)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _cards(arm: ArmPage) -> Iterator[dict[str, Any]]:
    def named(feature: float) -> list[str]:
        # With them a card needs nothing of the other arm's index.
        return list(arm.other_tokens[int(feature)][:_NAMING]) if feature == feature else []

    for i, row in enumerate(arm.features.to_dict("records")):
        yield {
            "threshold": _short(row["threshold"]),
            "cosine": _short(row["cosine"]),
            "histogram": [int(count) for count in arm.histograms[i]],
            "near": [[int(match), _short(value)] for match, value in arm.near[i]],
            "cross": [[int(match), _short(value), named(match)] for match, value in arm.cross[i]],
            "partner": named(row["partner"]),
            "lens": [[[token, _short(value, 2)] for token, value in end] for end in arm.lens.of(i)],
            "contexts": [_marked(context, row["max"]) for context in arm.contexts[i]],
        }


def _marked(context: Example, largest: float) -> list[Any]:
    """[segment, [[start, end, strength], ...]]: positions in characters, strength 1-9 of
    `largest`."""
    spans, start = [], 0
    for piece, act in zip(context.pieces, context.acts, strict=True):
        end = start + len(piece)
        if act > 0:
            strength = round(9 * act / largest) if largest > 0 else 1
            spans.append([start, end, min(max(strength, 1), 9)])
        start = end
    return [context.segment, spans]


def _short(value: Any, digits: int = 4) -> Any:
    """Words as they are, numbers with so many significant digits, what is missing as None."""
    if value is None or isinstance(value, str):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


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
