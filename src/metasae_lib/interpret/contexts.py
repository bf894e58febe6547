"""Contexts: for every feature, stretches of held-out text where it fires, and where it does not.

The role `contexts` is cut into *segments* of `window` tokens that never overlap, so examples that
are disjoint as segments are disjoint as text. A feature fires in a segment if it exceeds its
threshold on any token there; its strength there is its largest activation. One pass over the
residuals serves every arm, and keeps for each

- a uniform sample of the firing segments of every feature: those with the smallest hash of
  (seed, feature, segment), which depends on neither order nor interruptions;
- one bit for every feature and segment, so that "does not fire" is a fact and not a guess.

Memory is bounded by features times examples; the bits lie on disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from metasae_lib.interpret.examples import (
    NO_TOKEN,
    QUANTILES,
    WINDOW,
    Array,
    Example,
    Layout,
    Pieces,
)
from metasae_lib.measure.patterns import above
from metasae_lib.measure.thresholds import (
    calibrate_arms,
    calibration_inputs,
    pre_activations,
    product_dtype,
)
from metasae_lib.study.errors import MeasureError
from metasae_lib.study.files import atomic_write
from metasae_lib.study.progress import progress
from metasae_lib.study.run import Artefact, Run, locked
from metasae_lib.study.sections import Negatives
from metasae_lib.subject.activations import Residuals
from metasae_lib.subject.corpus import load_tokens
from metasae_lib.train.dictionary import normalise

if TYPE_CHECKING:
    from torch import Tensor

    from metasae_lib.train.training import Arm


KEEP = 100  # firing segments kept for a feature
_VERSION = 1
_PART_TOKENS = 8192
_CHECKPOINT_SECONDS = 60


class Contexts:
    """The contexts of one arm. `n_features`; `n_firing` (n,): segments in which each one fires."""

    def __init__(
        self, artefact: Artefact, layout: Layout, rows: Array, pieces: Pieces, seed: int
    ) -> None:
        self.key = artefact.key
        self.layout = layout
        self.pieces = pieces
        self._rows, self._seed = rows, seed
        with np.load(artefact.folder / "examples.npz") as arrays:
            self.n_firing: Array = arrays["n_firing"]
            self._segment, self._strength = arrays["segment"], arrays["strength"]
        self._acts = np.load(artefact.folder / "acts.npy", mmap_mode="r")
        self._fired = np.load(artefact.folder / "fired.npy", mmap_mode="r")
        self.n_features = len(self.n_firing)

    @cached_property
    def token_counts(self) -> Array:
        """(vocabulary up to the largest id,) occurrences of each token in the role's text."""
        return np.bincount(np.asarray(self._rows).ravel())

    def examples(self, feature: int) -> list[Example]:
        """The firing segments kept for a feature, in the random order of their hashes."""
        kept = np.flatnonzero(self._segment[feature] >= 0)
        return [self._example(int(self._segment[feature, k]), self._acts[feature, k]) for k in kept]

    def top(self, feature: int, count: int) -> list[Example]:
        """The `count` strongest of the kept segments, strongest first."""
        order = np.argsort(-self._strength[feature], kind="stable")[:count]
        return [
            self._example(int(self._segment[feature, k]), self._acts[feature, k])
            for k in order
            if self._segment[feature, k] >= 0
        ]

    def activations(self, feature: int) -> Array:
        """Every activation above the threshold in the kept segments, (m,)."""
        values = self._acts[feature]
        return values[values > 0]

    def split(self, feature: int, explain: int, score: int) -> tuple[list[Example], list[Example]]:
        """Disjoint examples for the explainer and for the scorer, each over all quantiles.

        The kept segments are cut by strength into five quantiles of equal size. `score` examples
        come first, the same number from each quantile (its first by hash), then `explain` ones from
        what is left, likewise; both are returned quantile by quantile, the weakest first. Both
        numbers must be multiples of five. Raises MeasureError if the feature has too few.
        """
        if explain % QUANTILES or score % QUANTILES:
            raise MeasureError(
                f"numbers of examples must be multiples of {QUANTILES}, not {explain} and {score}"
            )
        kept = np.flatnonzero(self._segment[feature] >= 0)
        if len(kept) < explain + score:
            raise MeasureError(
                f"feature {feature} has {len(kept)} examples, but {explain + score} are asked for"
            )
        by_strength = kept[np.argsort(self._strength[feature, kept], kind="stable")]
        test, train = score // QUANTILES, explain // QUANTILES
        scored, explained = [], []
        for part in np.array_split(by_strength, QUANTILES):
            order = np.sort(part)  # slots are in the order of the hashes
            scored += list(order[:test])
            explained += list(order[test : test + train])
        examples = {
            k: self._example(int(self._segment[feature, k]), self._acts[feature, k])
            for k in (*scored, *explained)
        }
        return [examples[k] for k in explained], [examples[k] for k in scored]

    def non_activating(self, feature: int, count: int, kind: Negatives = "random") -> list[Example]:
        """Up to `count` segments in which the feature does not fire on any token.

        kind: `random`; `token` (near misses that hold its most frequent peak token); `cooccurrence`
        (near misses in which the feature that shares most segments with it fires). Near misses
        come first, and random segments fill up what they do not give.
        """
        segments = self.layout.segments()
        silent = ~self._bits(feature)[segments]
        free = segments[silent]
        free = free[np.argsort(_hash(self._seed + 1, feature, free), kind="stable")]
        if kind != "random":
            near: Array = (
                self._with_token(feature) if kind == "token" else self._with_partner(feature)
            )
            first = near[free]
            free = np.concatenate([free[first], free[~first]])
        none = np.zeros(self.layout.window, np.float32)
        return [self._example(int(segment), none) for segment in free[:count]]

    def fires_in(self, feature: int, segment: int) -> bool:
        """Whether the feature exceeds its threshold on a token of the segment."""
        return bool(self._fired[feature, segment // 8] >> (7 - segment % 8) & 1)

    def usable(self, examples: int, silent: int) -> Array:
        """Features with at least `examples` firing segments kept and `silent` others, ascending."""
        kept = (self._segment >= 0).sum(axis=1)
        n_silent = len(self.layout.segments()) - self.n_firing
        return np.flatnonzero((kept >= examples) & (n_silent >= silent))

    def table(self, examples: int, silent: int) -> pd.DataFrame:
        """Every feature: segments in which it fires, and whether that is enough to score it.

        Columns: feature, n_firing, verdict (`enough`, `dead`, `too few`, or `fires too often`).
        """
        enough = np.isin(np.arange(self.n_features), self.usable(examples, silent))
        few = np.where(self.n_firing == 0, "dead", "too few")
        few = np.where(self.n_firing >= examples, "fires too often", few)
        return pd.DataFrame(
            {
                "feature": np.arange(self.n_features),
                "n_firing": self.n_firing,
                "verdict": np.where(enough, "enough", few),
            }
        )

    def with_words(self, words: Sequence[str], count: int) -> tuple[list[Example], list[Example]]:
        """Up to `count` segments that hold one of the words, and as many that hold none.

        The words' tokens have the number of such tokens in the segment as activation: the segments
        are those of a feature that would fire on just these words, the more the more there are.
        Words count if they are one token (with or without a space before it, in any case). The
        segments without are a random sample; those with are one for each strength, taken in turns
        from the weakest up, so that strengths differ as much as the text allows.
        """
        wanted = {word.lower() for word in words}
        used = np.asarray(self._rows[:, : self.layout.per_row * self.layout.window])
        vocabulary = np.unique(used)
        tokens = [i for i in vocabulary if "".join(self.pieces([int(i)])).strip().lower() in wanted]
        found: Array = np.asarray(np.isin(used, tokens)).reshape(-1, self.layout.window)
        hits: Array = np.asarray(found.sum(axis=1))
        segments = self.layout.segments()
        order = np.argsort(_hash(self._seed + 2, 0, segments), kind="stable")
        firing = order[hits[order] > 0]
        firing = firing[np.argsort(hits[firing], kind="stable")]
        firing = firing[np.argsort(_rank(hits[firing]), kind="stable")][:count]
        silent = order[hits[order] == 0][: len(firing)]
        return (
            [self._example(int(segments[k]), found[k] * hits[k]) for k in firing],
            [self._example(int(segments[k]), found[k]) for k in silent],
        )

    def _example(self, segment: int, acts: Array) -> Example:
        row, start = self.layout.place(segment)
        ids = tuple(self._rows[row, start : start + self.layout.window].tolist())
        return Example(ids, self.pieces(ids), tuple(acts.tolist()), segment)

    def _bits(self, feature: int) -> Array:
        return np.unpackbits(self._fired[feature]).astype(bool)

    def _with_token(self, feature: int) -> Array:
        """Bool by segment: holds the token on which the feature most often is strongest."""
        peaks = Counter(e.ids[e.peak] for e in self.examples(feature))
        near = np.zeros(8 * self._fired.shape[1], bool)
        if peaks:
            token = min(peaks, key=lambda t: (-peaks[t], t))
            used = self._rows[:, : self.layout.per_row * self.layout.window]
            holds = (used == token).reshape(-1, self.layout.window).any(axis=1)
            near[self.layout.segments()[holds]] = True
        return near

    def _with_partner(self, feature: int) -> Array:
        """Bool by segment: the feature that shares most firing segments fires."""
        shared = np.array(
            [int(np.bitwise_count(row & self._fired[feature]).sum()) for row in self._fired]
        )
        shared[feature] = -1
        return self._bits(int(shared.argmax()))


def collect_contexts(
    run: Run, arms: Mapping[str, Arm], window: int = WINDOW, keep: int = KEEP, seed: int = 0
) -> dict[str, Contexts]:
    """Contexts of every arm, by name, in one pass over the role `contexts`; artefact-cached.

    window: tokens of a segment. keep: firing segments kept for a feature. Arms are calibrated if
    they are not. Killed in the middle, the pass goes on from its last checkpoint, to the same
    result. Raises MeasureError if the rows are shorter than a window.
    """
    profile = run.profile
    if not 1 <= window <= profile.text.context_length:
        raise MeasureError(
            f"a window of {window} tokens does not fit rows of {profile.text.context_length}: "
            f"choose a smaller one"
        )
    calibrate_arms(run, arms)
    residuals, tokens = Residuals(run, "contexts"), load_tokens(run)
    rows = tokens.rows("contexts")
    layout = Layout(len(rows), profile.text.context_length, profile.activations.chunk_rows, window)
    inputs = {
        "on": residuals.inputs,
        "calibration": calibration_inputs(run, Residuals(run, "calibration")),
        "rule": profile.evaluation.threshold_rule,
        "window": window,
        "keep": keep,
        "seed": seed,
    }
    artefacts = {
        name: run.artefact("contexts", {"arm": arm.folder.name, **inputs}, _VERSION)
        for name, arm in arms.items()
    }
    with locked(artefacts.values()):
        missing = [
            _Collector(arms[name], artefact, layout, keep, seed)
            for name, artefact in artefacts.items()
            if not artefact.complete
        ]
        if missing:
            _collect(run, residuals, missing, profile.text.kept_per_row)
    pieces = Pieces(tokens.tokenizer)
    return {
        name: Contexts(artefact, layout, rows, pieces, seed) for name, artefact in artefacts.items()
    }


def _collect(
    run: Run, residuals: Residuals, collectors: Sequence[_Collector], kept_per_row: int
) -> None:
    dtype = product_dtype(run)
    part_rows = max(1, _PART_TOKENS // kept_per_row)
    saved = time.monotonic()
    first = min(one.next_chunk for one in collectors)
    with progress(residuals.n_tokens, f"contexts of {len(collectors)} arms") as bar:
        for index in range(first, residuals.n_chunks):
            active = [one for one in collectors if one.next_chunk == index]
            for part, x in enumerate(residuals.chunk(index).split(part_rows * kept_per_row)):
                z = normalise(x.float())[0]
                for one in active:
                    pre = pre_activations(one.arm.sae, z, dtype)
                    one.add(index, part * part_rows, kept_per_row, pre)
                bar.update(len(x))
            for one in active:
                one.next_chunk += 1
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                for one in active:
                    one.checkpoint()
                saved = time.monotonic()
    for one in collectors:
        one.finish()


class _Collector:
    """What one arm's pass has gathered: a pool of candidate segments, and the bits on disk."""

    def __init__(self, arm: Arm, artefact: Artefact, layout: Layout, keep: int, seed: int) -> None:
        self.arm, self.artefact, self.layout, self.keep, self.seed = (
            arm, artefact, layout, keep, seed
        )  # fmt: skip
        assert arm.sae.threshold is not None
        self.threshold = arm.sae.threshold
        self.n = arm.sae.n_features
        self.next_chunk = 0
        self.worst = np.full(self.n, NO_TOKEN)  # the largest hash that a full sample holds
        self.n_firing = np.zeros(self.n, np.int64)
        self.pool: list[tuple[Array, ...]] = []
        self.pooled = 0
        self.partial = artefact.folder / "partial.npz"
        path, size = artefact.folder / "fired.npy", layout.n_chunks * layout.chunk_bytes
        if self.partial.exists() and path.exists():
            with np.load(self.partial) as state:
                self.next_chunk = int(state["next_chunk"])
                self.worst, self.n_firing = state["worst"], state["n_firing"]
                self._put(tuple(state[f"pool{k}"] for k in range(5)))
            self.fired = np.lib.format.open_memmap(path, "r+")
        else:
            self.fired = np.lib.format.open_memmap(path, "w+", np.uint8, (self.n, size))

    def add(self, chunk: int, first_row: int, kept_per_row: int, pre: Tensor) -> None:
        """Add the pre-activations (t, n) of whole rows, of which `first_row` is the chunk's."""
        tokens, features, values = _firing(pre, self.threshold)
        window, per_row = self.layout.window, self.layout.per_row
        skipped = self.layout.context_length - kept_per_row
        row, column = tokens // kept_per_row, tokens % kept_per_row + skipped
        inside = column < per_row * window
        row, column, features, values = (a[inside] for a in (row, column, features, values))
        local = (first_row + row) * per_row + column // window
        if not len(local):
            return
        # Entries of one feature and segment side by side; `begin` is where each such group starts.
        order = np.lexsort((local, features))
        features, local, values, column = (a[order] for a in (features, local, values, column))
        new = np.r_[True, (np.diff(features) != 0) | (np.diff(local) != 0)]
        begin, group = np.flatnonzero(new), np.cumsum(new) - 1
        f, s = features[begin], local[begin]
        strength = np.maximum.reduceat(values, begin)
        self.n_firing += np.bincount(f, minlength=self.n)
        self._mark(chunk, f, s)
        segment = chunk * 8 * self.layout.chunk_bytes + s
        hashes = _hash(self.seed, f, segment)
        good = hashes < self.worst[f]
        acts = np.zeros((good.sum(), window), np.float32)
        slot = np.cumsum(good) - 1
        entry = good[group]
        acts[slot[group[entry]], column[entry] % window] = values[entry]
        self._put((f[good], hashes[good], segment[good], strength[good], acts))
        if self.pooled > 2 * self.n * self.keep:
            self._prune()

    def checkpoint(self) -> None:
        """Write what a later process needs to go on from the next chunk."""
        self._prune()
        self.fired.flush()
        arrays = {f"pool{k}": array for k, array in enumerate(self.pool[0])}
        with atomic_write(self.partial) as path:
            np.savez(
                path, next_chunk=self.next_chunk, worst=self.worst, n_firing=self.n_firing,
                allow_pickle=False, **arrays,
            )  # fmt: skip

    def finish(self) -> None:
        """Write the artefact."""
        self._prune()
        feature, _, segment, strength, acts = self.pool[0]
        rank = _rank(feature)
        segments = np.full((self.n, self.keep), -1, np.int64)
        strengths = np.zeros((self.n, self.keep), np.float32)
        all_acts = np.zeros((self.n, self.keep, self.layout.window), np.float32)
        segments[feature, rank], strengths[feature, rank] = segment, strength
        all_acts[feature, rank] = acts
        folder = self.artefact.folder
        with atomic_write(folder / "examples.npz") as path:
            np.savez(path, segment=segments, strength=strengths, n_firing=self.n_firing)
        with atomic_write(folder / "acts.npy") as path:
            np.save(path, all_acts)
        self.fired.flush()
        self.partial.unlink(missing_ok=True)
        self.artefact.finish({"n_segments": len(self.layout.segments())})

    def _mark(self, chunk: int, features: Array, local: Array) -> None:
        first = chunk * self.layout.chunk_bytes
        bits = (128 >> (local % 8)).astype(np.uint8)
        # Several segments share a byte, so the writes have to accumulate.
        np.bitwise_or.at(self.fired, (features, first + local // 8), bits)

    def _put(self, entries: tuple[Array, ...]) -> None:
        self.pool.append(entries)
        self.pooled += len(entries[0])

    def _prune(self) -> None:
        """Keep the `keep` smallest hashes of every feature."""
        empty = (
            np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64),
            np.empty(0, np.float32), np.empty((0, self.layout.window), np.float32),
        )  # fmt: skip
        joined = tuple(np.concatenate(parts) for parts in zip(empty, *self.pool, strict=True))
        order = np.lexsort((joined[1], joined[0]))
        order = order[_rank(joined[0][order]) < self.keep]
        self.pool, self.pooled = [], 0
        self._put(tuple(array[order] for array in joined))
        feature, hashes = self.pool[0][:2]
        full = _rank(feature) == self.keep - 1
        self.worst[feature[full]] = hashes[full]


def _firing(pre: Tensor, threshold: Tensor) -> tuple[Array, Array, Array]:
    """Tokens, features and values of what exceeds the thresholds, token by token."""
    if pre.device.type == "cpu":
        pattern, values = above(pre.numpy(), threshold.numpy())
        tokens = np.repeat(np.arange(len(pre)), np.diff(pattern.indptr))
        return tokens, pattern.indices.astype(np.int64), values
    where = (pre > threshold).nonzero()
    values = pre[where[:, 0], where[:, 1]].cpu().numpy()
    return where[:, 0].cpu().numpy(), where[:, 1].cpu().numpy(), values


def _rank(feature: Array) -> Array:
    """Position of each entry within its run of equal features."""
    starts = np.r_[True, np.diff(feature) != 0][: len(feature)]
    rank: Array = np.arange(len(feature)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
    return rank


def _hash(seed: int, feature: Array | int, segment: Array) -> Array:
    """Uniform 64-bit hashes of (seed, feature, segment): SplitMix64's finaliser, three times."""
    x = np.full(np.shape(segment), seed, np.uint64)
    for value in (feature, segment):
        x = x + np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    # The largest value stands for an empty place.
    hashed: Array = np.minimum(x, NO_TOKEN - np.uint64(1))
    return hashed
