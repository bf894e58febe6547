"""Words with several senses: where they stand, how they are used, and what features know of it.

Senses have no labels here. Each stands on a stated proxy: a pattern in the words just before or
just after. A proxy is cruder than a sense, but it is the same for every dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy import sparse

from metasae_lib.interpret.contexts import Contexts
from metasae_lib.measure import Counts, CrossCounts, phi, top_matches
from metasae_lib.measure.passes import Entered, pre_activations, product_dtype
from metasae_lib.study import MeasureError, Role, Run
from metasae_lib.subject import Residuals
from metasae_lib.train import Arm

AROUND = 16  # tokens of text kept on either side of a place
PURE = 0.8  # share of one sense from which a feature belongs to it
WEAKEST = 0.173  # the smallest |φ| that the paper counts as a part of a split (Table 5)


@dataclass(frozen=True)
class Sense:
    """One use of a word. before and after: patterns for the text that ends, or starts, at it."""

    name: str
    before: str = ""
    after: str = ""


_WORDS = Path(__file__).with_name("words.yml").read_text(encoding="utf-8")
#: Words and the proxies of their senses, tried in order; an occurrence that fits none is left out.
WORDS: dict[str, tuple[Sense, ...]] = {
    word: tuple(Sense(**proxies) for proxies in senses)
    for word, senses in yaml.safe_load(_WORDS).items()
}


@dataclass(frozen=True)
class Occurrence:
    """One place of a word: its row, the position of its last token, and the text around it.

    origin: what must stand beside that text (`known.attribution`).
    """

    row: int
    position: int
    before: str
    word: str
    after: str
    origin: str = ""

    @classmethod
    def of(
        cls, row: int, position: int, before: str, token: str, after: str, origin: str = ""
    ) -> Occurrence:
        """From a token's text, whose leading blanks stand before the word."""
        word = token.lstrip()
        return cls(row, position, before + token.removesuffix(word), word, after, origin)


def occurrences(
    rows: NDArray[Any], tokenizer: Any, word: str, first: int = 1, around: int = AROUND
) -> list[Occurrence]:
    """Every place of a whole word in token rows, in lower and title case.

    rows: (r, c) token ids. Positions before `first` are left out, as in every statistic; a longer
    word that only begins or ends like this one is none. `around`: tokens decoded on either side.
    """
    found = []
    forms = [f"{blank}{form}" for form in (word, word.capitalize()) for blank in (" ", "")]
    spellings = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
    for ids in dict.fromkeys(spellings):
        fits = np.ones((rows.shape[0], max(rows.shape[1] - len(ids) + 1, 0)), bool)
        for i, token in enumerate(ids):
            fits &= rows[:, i : i + fits.shape[1]] == token
        for row, start in np.argwhere(fits).tolist():
            end = start + len(ids)
            before = tokenizer.decode(rows[row, max(start - around, first) : start])
            after = tokenizer.decode(rows[row, end : end + around])
            itself = tokenizer.decode(rows[row, start:end])
            glued = before[-1:].isalnum() and not itself[:1].isspace()
            if end > first and not glued and not after[:1].isalnum():
                found.append(Occurrence.of(row, end - 1, before, itself, after))
    return sorted(found, key=lambda o: (o.row, o.position))


def places_of(contexts: Contexts, feature: int) -> list[Occurrence]:
    """Where a feature fires in the role `contexts`: the strongest token of each segment kept."""
    found = []
    for example in contexts.examples(feature):
        row, start = contexts.layout.place(example.segment)
        parts = (slice(example.peak), example.peak, slice(example.peak + 1, None))
        before, word, after = ("".join(example.pieces[part]) for part in parts)
        place = row, start + example.peak
        found.append(Occurrence.of(*place, before, word, after, example.origin))
    return found


def label(occurrence: Occurrence, senses: Sequence[Sense]) -> int:
    """Index of the first sense of which both patterns fit (an empty one always), -1 if none does.

    Case makes no difference.
    """
    for index, sense in enumerate(senses):
        before = re.search(rf"(?:{sense.before})$", occurrence.before, re.IGNORECASE)
        if before and re.match(sense.after, occurrence.after, re.IGNORECASE):
            return index
    return -1


def firing_at(
    run: Run, arms: Mapping[str, Arm], role: Role, found: Sequence[Occurrence]
) -> dict[str, sparse.csr_array]:
    """Activations above the thresholds at some places of a role, for every (calibrated) arm.

    Returns (m, n) sparse by arm name, a row an occurrence in the order given.
    """
    text = run.profile.text
    skipped = text.context_length - text.kept_per_row
    places = np.array([o.row * text.kept_per_row + o.position - skipped for o in found], np.int64)
    order, start = np.argsort(places, kind="stable"), 0
    places = places[order]
    residuals, dtype = Residuals(run, role), product_dtype(run)
    rows = {name: [sparse.csr_array((0, arm.sae.n_features))] for name, arm in arms.items()}
    for index in range(residuals.n_chunks):
        stop = start + residuals.chunk_tokens(index)
        here = places[(places >= start) & (places < stop)] - start
        if len(here):
            tokens = Entered(residuals.chunk(index)[here])
            for name, arm in arms.items():
                pre = pre_activations(arm.sae, tokens.of(arm.sae), dtype)
                assert arm.sae.threshold is not None
                acts = pre.float() * (pre > arm.sae.threshold)
                rows[name].append(sparse.csr_array(acts.cpu().numpy()))
        start = stop
    back = np.argsort(order, kind="stable")
    return {name: sparse.csr_array(sparse.vstack(parts))[back] for name, parts in rows.items()}


def mutual_information(fired: NDArray[Any], total: int, sizes: NDArray[Any]) -> NDArray[np.float64]:
    """I(sense; feature fires) in bits, plug-in estimate.

    fired: (..., s, n) tokens of each sense on which each feature fires. sizes: (s,) tokens of each
    sense, `total` in all. Returns (..., n).
    """
    sizes = np.asarray(sizes, float)[:, None]
    counts = np.stack([np.asarray(fired, float), sizes - fired], axis=-3)  # (..., 2, s, n)
    either = counts.sum(axis=-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = counts / total * np.log2(counts * total / (either * sizes))
    return np.nan_to_num(terms, nan=0.0).sum(axis=(-3, -2))


@dataclass(frozen=True)
class Information:
    """What the best single feature tells of a word's sense.

    bits: largest mutual information over features; feature: which. entropy: of the senses, the
    most that anything can tell. null_mean, null_high: mean and 95% quantile of the same largest
    value after the senses were shuffled among the occurrences. share: (bits - null_mean) over
    (entropy - null_mean), 0 for chance and 1 for a feature that knows.
    """

    bits: float
    feature: int
    entropy: float
    null_mean: float
    null_high: float
    p: float

    @property
    def share(self) -> float:
        """Information above chance, as a share of what there is."""
        return (self.bits - self.null_mean) / max(self.entropy - self.null_mean, 1e-12)


def sense_information(
    fires: sparse.csr_array, senses: NDArray[np.int64], permutations: int = 200, seed: int = 0
) -> Information:
    """The best feature's mutual information with the senses, and its null by permutation.

    fires: (m, n) sparse, non-zero where a feature fires on an occurrence. senses: (m,) from 0. The
    maximum over features is taken in every permutation too, so many features are no advantage.
    """
    if fires.shape[0] != len(senses) or len(np.unique(senses)) < 2:
        raise MeasureError(
            f"{fires.shape[0]} firing rows and {len(senses)} senses of "
            f"{len(np.unique(senses))} kinds: give one sense an occurrence, two kinds at least"
        )
    total, sizes = len(senses), np.bincount(senses)
    share = sizes[sizes > 0] / total
    entropy = float(-(share * np.log2(share)).sum())
    pattern = sparse.csr_array(fires)
    pattern.data = np.ones_like(pattern.data, dtype=np.float64)
    alive = np.flatnonzero(pattern.sum(axis=0))
    if not len(alive):
        return Information(0.0, -1, entropy, 0.0, 0.0, 1.0)
    pattern = pattern.tocsc()[:, alive].tocsr()

    def best(labels: NDArray[np.int64]) -> tuple[float, int]:
        """Largest information and its feature."""
        of_sense = sparse.csr_array(labels == np.arange(len(sizes))[:, None])
        bits = mutual_information((of_sense @ pattern).toarray(), total, sizes)
        return float(bits.max()), int(bits.argmax())

    bits, feature = best(senses)
    rng = np.random.default_rng(seed)
    null = np.array([best(rng.permutation(senses))[0] for _ in range(permutations)])
    return Information(
        bits=bits,
        feature=int(alive[feature]),
        entropy=entropy,
        null_mean=float(null.mean()) if permutations else 0.0,
        null_high=float(np.quantile(null, 0.95)) if permutations else 0.0,
        p=float((1 + (null >= bits - 1e-12).sum()) / (1 + permutations)),
    )


def bootstrap_difference(
    a: sparse.csr_array, b: sparse.csr_array, senses: NDArray[np.int64],
    draws: int = 200, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """95% interval of the best feature's bits in b minus those in a, occurrences drawn anew.

    a (m, n_a) and b (m, n_b): firing on the same occurrences. Each draw takes m occurrences with
    replacement, the same ones for both.
    """
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(draws):
        take = rng.integers(len(senses), size=len(senses))
        if len(np.unique(senses[take])) > 1:
            before, after = (sense_information(x[take], senses[take], 0).bits for x in (a, b))
            differences.append(after - before)
    low, high = np.quantile(differences, [0.025, 0.975]) if differences else (np.nan, np.nan)
    return float(low), float(high)


def case_study(
    cross: CrossCounts,
    solo: Counts,
    fires_solo: sparse.csr_array,
    fires_joint: sparse.csr_array,
    labels: NDArray[np.int64],
    names: Sequence[str],
    n_partners: int = 3,
) -> pd.DataFrame:
    """A table like the paper's Tables 2-5 for any word: its solo feature and that one's partners.

    cross and solo: counts of the scan. fires_*: (m, n) firing on the word's m places in the same
    scan. labels (m,): sense of each place, -1 for none; names: of the senses. The solo feature is
    the one whose firing has the largest φ with the word itself. Columns: sae, feature, phi (with
    the solo feature), phi_word, rate, `<sense>` (share of its places on which the feature fires),
    sense (to which the feature belongs, "" if to none: see `belongs`).
    """
    places = fires_solo.astype(bool).sum(axis=0)
    with_word = phi(places[:, None], solo.n1, [len(labels)], solo.n_tokens)[:, 0]
    feature = int(np.nan_to_num(with_word, nan=-np.inf).argmax())
    one = CrossCounts(
        np.asarray(cross.n11[[feature]]), cross.n1_a[[feature]], cross.n1_b, cross.n_tokens
    )
    partners = top_matches(one, n_partners)
    matches = zip(partners.match, partners.phi, strict=True)
    about = [("solo", feature, np.nan, fires_solo, solo.n1)]
    about += [("joint", i, v, fires_joint, cross.n1_b) for i, v in matches]
    rows: list[tuple[Any, ...]] = []
    for sae, index, value, fires, n1 in about:
        fired = fires[:, [index]].toarray().ravel() != 0
        by_sense = pd.Series(fired).groupby(labels).mean()
        shares = by_sense.reindex(range(len(names)), fill_value=0.0).tolist()
        word = phi(np.array([[fired.sum()]]), [n1[index]], [len(labels)], solo.n_tokens).item()
        rate = float(n1[index] / solo.n_tokens)
        rows.append((sae, index, value, word, rate, *shares, belongs(shares, names)))
    columns = ["sae", "feature", "phi", "phi_word", "rate", *names, "sense"]
    return pd.DataFrame(rows, columns=columns)


def belongs(shares: Sequence[float], names: Sequence[str]) -> str:
    """The sense that makes `PURE` or more of a feature's firing, all senses equally weighted."""
    total = sum(shares)
    best = int(np.argmax(shares))
    return names[best] if total > 0 and shares[best] >= PURE * total else ""


def split_sentence(word: str, table: pd.DataFrame) -> str:
    """Whether a table of `case_study` shows what the paper saw, in words drawn from it."""
    solo, joint = table[table.sae == "solo"].iloc[0], table[table.sae == "joint"]
    parts = joint[(joint.phi >= WEAKEST) & (joint.sense != "")].drop_duplicates("sense")
    if len(parts) > 1 and solo.sense == "":
        told = "; ".join(f"{row.feature} is for “{row.sense}”" for row in parts.itertuples())
        return (
            f"**“{word}” splits as in the paper**: solo feature {solo.feature} fires on several "
            f"senses, and of its joint partners {told}."
        )
    if solo.sense != "":
        why = f"the solo feature {solo.feature} already belongs to one sense, “{solo.sense}”"
    elif len(parts) == 1:
        row = parts.iloc[0]
        why = f"only joint feature {row.feature} belongs to one sense, “{row.sense}”"
    else:
        why = f"no joint partner of solo feature {solo.feature} belongs to one sense"
    return f"**“{word}” does not split as in the paper**: {why}."


def side_by_side(
    found: Sequence[Occurrence],
    labels: NDArray[np.int64],
    names: Sequence[str],
    acts: Mapping[str, NDArray[Any]],
    per_sense: int = 3,
) -> pd.DataFrame:
    """The same contexts under several features: the first places of each sense, activations beside.

    acts: by heading, (m,). Columns: sense, context (quoted), text (its origin), one a heading.
    """
    rows = []
    for sense, name in enumerate(names):
        for i in np.flatnonzero(labels == sense)[:per_sense]:
            one = found[i]
            text = quoted(f"{one.before[-40:]}«{one.word}»{one.after[:30]}")
            rows.append((name, text, one.origin, *(float(a[i]) or None for a in acts.values())))
    return pd.DataFrame(rows, columns=["sense", "context", "text", *acts])


def quoted(text: str) -> str:
    """Text of a corpus as a code span: nothing in it is read as Markdown or HTML."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "ˋ").strip() + "`"
