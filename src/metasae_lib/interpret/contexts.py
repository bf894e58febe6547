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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial

import numpy as np
import pandas as pd
from torch import Tensor

from metasae_lib.interpret.examples import QUANTILES, WINDOW, Array, Example, Layout, Pieces
from metasae_lib.measure import calibrate_arms
from metasae_lib.measure.passes import Entered, by_arm, pre_activations, product_dtype
from metasae_lib.measure.patterns import above
from metasae_lib.measure.scan import scan_inputs
from metasae_lib.study import Artefact, MeasureError, Run, atomic_write, progress
from metasae_lib.study.sections import Negatives
from metasae_lib.subject import Residuals, Tokens, load_tokens
from metasae_lib.train import Arm

KEEP = 100  # firing segments kept for a feature
_VERSION = 1
_PART_TOKENS = 8192
_CHECKPOINT_SECONDS = 60
_NO_HASH = np.uint64(2**64 - 1)  # of an empty place
_Segment = tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]  # ids, pieces, sources


class Contexts:
    """The contexts of one arm. `n_features`; `n_firing` (n,): segments in which each one fires."""

    def __init__(
        self,
        artefact: Artefact,
        layout: Layout,
        tokens: Tokens,
        pieces: Pieces,
        read: Callable[[int], _Segment],
        seed: int,
    ) -> None:
        self.layout = layout
        self.pieces = pieces
        self._read, self._rows, self._seed = read, tokens.rows("contexts"), seed
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
        return self._kept(feature, range(self._segment.shape[1]))

    def top(self, feature: int, count: int) -> list[Example]:
        """The `count` strongest of the kept segments, strongest first."""
        return self._kept(feature, np.argsort(-self._strength[feature], kind="stable")[:count])

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
        # Slots are in the order of the hashes.
        parts = [np.sort(part) for part in np.array_split(by_strength, QUANTILES)]
        first, last = score // QUANTILES, (score + explain) // QUANTILES
        explained = self._kept(feature, np.concatenate([part[first:last] for part in parts]))
        return explained, self._kept(feature, np.concatenate([part[:first] for part in parts]))

    def non_activating(self, feature: int, count: int, kind: Negatives = "random") -> list[Example]:
        """Up to `count` segments in which the feature does not fire on any token.

        kind: `random`; `token` (near misses that hold its most frequent peak token); `cooccurrence`
        (near misses in which the feature that shares most segments with it fires). Near misses
        come first, and random segments fill up what they do not give.
        """
        segments = self.layout.segments()
        free = np.flatnonzero(~self._bits(feature)[segments])
        free = free[np.argsort(_hash(self._seed + 1, feature, segments[free]), kind="stable")]
        if kind == "token":
            peaks = Counter(e.ids[e.peak] for e in self.examples(feature))
            token = min(peaks, key=lambda t: (-peaks[t], t), default=-1)
            near = (self._windows[free] == token).any(axis=1)
            free = free[np.argsort(~near, kind="stable")]
        elif kind == "cooccurrence":
            mine = self._fired[feature]
            shared = np.array([np.bitwise_count(row & mine).sum() for row in self._fired], int)
            shared[feature] = -1
            near = self._bits(int(shared.argmax()))[segments[free]]
            free = free[np.argsort(~near, kind="stable")]
        none = np.zeros(self.layout.window, np.float32)
        return [self._example(int(segment), none) for segment in segments[free[:count]]]

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
        cases = {"enough": enough, "dead": self.n_firing == 0, "too few": self.n_firing < examples}
        verdict = np.select(list(cases.values()), list(cases), "fires too often")
        frame = pd.DataFrame({"n_firing": self.n_firing, "verdict": verdict})
        return frame.rename_axis("feature").reset_index()

    def sample(self, count: int) -> list[Example]:
        """Up to `count` segments of the role's text as it comes, a uniform sample."""
        segments = self.layout.segments()
        order = np.argsort(_hash(self._seed + 3, 0, segments), kind="stable")[:count]
        none = np.zeros(self.layout.window, np.float32)
        return [self._example(int(segment), none) for segment in segments[order]]

    def with_words(self, words: Sequence[str], count: int) -> tuple[list[Example], list[Example]]:
        """Up to `count` segments that hold one of the words, and as many that hold none.

        The words' tokens have the number of such tokens in the segment as activation: the segments
        are those of a feature that would fire on just these words, the more the more there are.
        Words count if they are one token (with or without a space before it, in any case). The
        segments without are a random sample; those with are one for each strength, taken in turns
        from the weakest up, so that strengths differ as much as the text allows.
        """
        wanted = {word.lower() for word in words}
        tokens = [token for token, word in self._words.items() if word in wanted]
        found: Array = np.isin(self._windows, tokens)
        hits: Array = found.sum(axis=1)
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

    @cached_property
    def _words(self) -> dict[int, str]:
        """The text of every token that the windows hold, without space around it, in lower case."""
        vocabulary = np.unique(self._windows).tolist()
        return {token: "".join(self.pieces([token])).strip().lower() for token in vocabulary}

    @property
    def _windows(self) -> Array:
        """(segments, window) token ids, in the order of `layout.segments`."""
        used = np.asarray(self._rows[:, : self.layout.per_row * self.layout.window])
        return used.reshape(-1, self.layout.window)

    def _kept(self, feature: int, slots: Iterable[int]) -> list[Example]:
        """Examples of a feature's kept segments, by their slots; an empty slot gives none."""
        found = [(int(self._segment[feature, k]), self._acts[feature, k]) for k in slots]
        return [self._example(segment, acts) for segment, acts in found if segment >= 0]

    def _example(self, segment: int, acts: Array) -> Example:
        ids, pieces, sources = self._read(segment)
        return Example(ids, pieces, tuple(acts.tolist()), segment, sources)

    def _bits(self, feature: int) -> Array:
        return np.unpackbits(self._fired[feature]).astype(bool)


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
    n_rows = len(tokens.rows("contexts"))
    layout = Layout(n_rows, profile.text.context_length, profile.activations.chunk_rows, window)
    sample = {"window": window, "keep": keep, "seed": seed}

    def make(missing: Mapping[str, Artefact]) -> None:
        all_of = [_Collector(arms[name], one, layout, keep, seed) for name, one in missing.items()]
        _collect(run, residuals, all_of)

    inputs = by_arm(arms, scan_inputs(run, residuals) | sample)
    made = run.made("contexts", inputs, _VERSION, make)
    pieces = Pieces(tokens.tokenizer)
    read = cache(partial(_segment, layout, tokens, pieces))  # hundreds of features show a segment
    return {name: Contexts(one, layout, tokens, pieces, read, seed) for name, one in made.items()}


def _segment(layout: Layout, tokens: Tokens, pieces: Pieces, segment: int) -> _Segment:
    row, start = layout.place(segment)
    stop = start + layout.window
    ids = tuple(tokens.rows("contexts")[row, start:stop].tolist())
    return ids, pieces(ids), tokens.sources("contexts", row, start, stop)


def _collect(run: Run, residuals: Residuals, collectors: Sequence[_Collector]) -> None:
    dtype, kept_per_row = product_dtype(run), run.profile.text.kept_per_row
    part_rows = max(1, _PART_TOKENS // kept_per_row)
    saved = time.monotonic()
    first = min(one.next_chunk for one in collectors)
    with progress(residuals.n_tokens, f"contexts of {len(collectors)} arms") as bar:
        for index in range(first, residuals.n_chunks):
            active = [one for one in collectors if one.next_chunk == index]
            for part, x in enumerate(residuals.chunk(index).split(part_rows * kept_per_row)):
                tokens = Entered(x)
                for one in active:
                    pre = pre_activations(one.arm.sae, tokens.of(one.arm.sae), dtype)
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
        self.arm, self.artefact, self.layout = arm, artefact, layout
        self.keep, self.seed, self.n = keep, seed, arm.sae.n_features
        self.next_chunk = 0
        self.worst = np.full(self.n, _NO_HASH)  # the largest hash that a full sample holds
        self.n_firing = np.zeros(self.n, np.int64)
        kinds = {"feature": "i8", "hash": "u8", "segment": "i8", "strength": "f4"}
        kind = np.dtype([*kinds.items(), ("acts", "f4", (layout.window,))])
        self.pool = [np.empty(0, kind)]
        self.partial, path = artefact.folder / "candidates.npz", artefact.folder / "fired.npy"
        if self.partial.exists() and path.exists():
            with np.load(self.partial) as state:
                self.next_chunk, self.n_firing = int(state["next_chunk"]), state["n_firing"]
                self.pool = [state["pool"]]
            self._prune()
            self.fired = np.lib.format.open_memmap(path, "r+")
        else:
            size = layout.n_chunks * layout.chunk_bytes
            self.fired = np.lib.format.open_memmap(path, "w+", np.uint8, (self.n, size))

    def add(self, chunk: int, first_row: int, kept_per_row: int, pre: Tensor) -> None:
        """Add the pre-activations (t, n) of whole rows, of which `first_row` is the chunk's."""
        assert self.arm.sae.threshold is not None
        tokens, features, values = _firing(pre, self.arm.sae.threshold)
        window, per_row, room = self.layout.window, self.layout.per_row, 8 * self.layout.chunk_bytes
        skipped = self.layout.context_length - kept_per_row
        row, column = tokens // kept_per_row, tokens % kept_per_row + skipped
        local = (first_row + row) * per_row + column // window
        inside = column < per_row * window
        features, local, values, column = (a[inside] for a in (features, local, values, column))
        # Each feature and segment once, and to which of them every entry belongs.
        both, group = np.unique(features * room + local, return_inverse=True)
        f, s = both // room, both % room
        self.n_firing += np.bincount(f, minlength=self.n)
        # Several segments share a byte, so the writes have to accumulate.
        segment = chunk * room + s
        np.bitwise_or.at(self.fired, (f, segment // 8), (128 >> (s % 8)).astype(np.uint8))
        hashes = _hash(self.seed, f, segment)
        good = hashes < self.worst[f]
        kept = np.zeros(good.sum(), self.pool[0].dtype)
        strength = np.full(len(both), -np.inf, np.float32)
        np.maximum.at(strength, group, values)
        kept["feature"], kept["hash"] = f[good], hashes[good]
        kept["segment"], kept["strength"] = segment[good], strength[good]
        entry = good[group]
        slot = (np.cumsum(good) - 1)[group[entry]]
        kept["acts"][slot, column[entry] % window] = values[entry]
        self.pool.append(kept)
        if sum(map(len, self.pool)) > 2 * self.n * self.keep:
            self._prune()

    def checkpoint(self) -> None:
        """Write what a later process needs to go on from the next chunk."""
        self.fired.flush()
        with atomic_write(self.partial) as path:
            np.savez(
                path, next_chunk=self.next_chunk, n_firing=self.n_firing, pool=self._prune(),
                allow_pickle=False,
            )  # fmt: skip

    def finish(self) -> None:
        """Write the artefact."""
        pool = self._prune()
        place = pool["feature"], _rank(pool["feature"])
        shape, folder = (self.n, self.keep), self.artefact.folder
        segments, strengths = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        all_acts = np.zeros((*shape, self.layout.window), np.float32)
        segments[place], strengths[place] = pool["segment"], pool["strength"]
        all_acts[place] = pool["acts"]
        with atomic_write(folder / "examples.npz") as path:
            np.savez(path, segment=segments, strength=strengths, n_firing=self.n_firing)
        with atomic_write(folder / "acts.npy") as path:
            np.save(path, all_acts)
        self.fired.flush()
        self.partial.unlink(missing_ok=True)
        self.artefact.finish({"n_segments": len(self.layout.segments())})

    def _prune(self) -> Array:
        """Keep the `keep` smallest hashes of every feature; returns them, feature by feature."""
        pool = np.concatenate(self.pool)
        order = np.lexsort((pool["hash"], pool["feature"]))
        rank = _rank(pool["feature"][order])
        pool = pool[order[rank < self.keep]]
        full = pool[rank[rank < self.keep] == self.keep - 1]
        self.worst[full["feature"]] = full["hash"]
        self.pool = [pool]
        return pool


def _firing(pre: Tensor, threshold: Tensor) -> tuple[Array, Array, Array]:
    """Tokens, features and values of what exceeds the thresholds, token by token."""
    if pre.device.type == "cpu":
        pattern, values = above(pre, threshold)
        tokens = np.repeat(np.arange(len(pre)), np.diff(pattern.indptr))
        return tokens, pattern.indices.astype(np.int64), values
    where = (pre > threshold).nonzero()
    values = pre[where[:, 0], where[:, 1]].float().cpu().numpy()
    return where[:, 0].cpu().numpy(), where[:, 1].cpu().numpy(), values


def _rank(sorted_values: Array) -> Array:
    """Position of each entry within its run of equal values."""
    return np.arange(len(sorted_values)) - np.searchsorted(sorted_values, sorted_values)


def _hash(seed: int, feature: Array | int, segment: Array) -> Array:
    """Uniform 64-bit hashes of (seed, feature, segment): SplitMix64's finaliser, three times."""
    x = np.full(np.shape(segment), seed, np.uint64)
    for value in (feature, segment):
        x = x + np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    hashed: Array = np.minimum(x, _NO_HASH - np.uint64(1))
    return hashed
