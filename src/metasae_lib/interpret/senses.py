"""Words with several senses: where they stand, how they are used, and what features know of it.

Senses have no labels here. Each stands on a stated proxy: a pattern in the words just before or
just after. A proxy is cruder than a sense, but it is the same for every dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from metasae_lib.measure.counting import Counts, CrossCounts
from metasae_lib.measure.cross import top_matches
from metasae_lib.measure.phi import phi
from metasae_lib.measure.thresholds import pre_activations, product_dtype
from metasae_lib.study.errors import MeasureError
from metasae_lib.study.run import Run
from metasae_lib.study.sections import Role
from metasae_lib.subject.activations import Residuals
from metasae_lib.train.dictionary import normalise

if TYPE_CHECKING:
    from metasae_lib.interpret.contexts import Contexts
    from metasae_lib.train.training import Arm


PURE = 0.8  # share of one sense from which a feature belongs to it
WEAKEST = 0.173  # the smallest |φ| that the paper counts as a part of a split (Table 5)


@dataclass(frozen=True)
class Sense:
    """One use of a word. before and after: patterns for the text that ends, or starts, at it."""

    name: str
    before: str = ""
    after: str = ""

    def matches(self, before: str, after: str) -> bool:
        """Whether both patterns fit, the empty one always."""
        return bool(
            re.search(rf"(?:{self.before})$", before, re.IGNORECASE)
            and re.match(self.after, after, re.IGNORECASE)
        )


#: Words and the proxies of their senses, tried in order; an occurrence that fits none is left out.
WORDS: dict[str, tuple[Sense, ...]] = {
    "too": (
        Sense("also", after=r"\s*([.,;:!?)]|$)"),
        Sense("excess", after=r"\s+(many|much|few|little|often|long|late|far|[a-z]+)\b"),
    ),
    "let": (
        Sense("suggestion", after=r"\s*(['’]\s*s|us|me)\b"),
        Sense("permission", after=r"\s+(him|her|it|them|the|this|that|people|any|anyone|you|go)\b"),
    ),
    "right": (
        Sense("entitlement", after=r"\s+(to|of)\b"),
        Sense("direction or moment", after=r"\s+(now|away|side|wing|hand|here|there|after)\b"),
    ),
    "bank": (
        Sense("West Bank", before=r"\bwest "),
        Sense("riverside", before=r"\b(north|south|east|left|right|river) "),
        Sense("finance", before=r"\b(world|central|national|investment|the|a|s|of) "),
    ),
    "light": (
        Sense("in light of", before=r"\bin (the )?", after=r"\s+of\b"),
        Sense("not heavy", after=r"\s+(industry|weapons|brown|touch|rain|up|breeze|and fluffy)\b"),
        Sense("what shines", after=r"\s*(on|from|source|bulbs?|years?|[.,])"),
    ),
    "spring": (
        Sense("season", before=r"\b(in|this|last|next|early|late|in the|of) "),
        Sense("onion or roll", after=r"\s+(onions?|rolls?|greens)\b"),
    ),
    "bar": (
        Sense("food or law", before=r"\b(chocolate|candy|the state|granola) "),
        Sense("place or rod", after=r"\s*(in|at|and|for|to|[.,])"),
    ),
    "match": (
        Sense("game", before=r"\b(the|a|this|final|first|last|test|cup|league|opening) "),
        Sense("equal", before=r"\b(to|not|that|must|will|would|can|could) "),
    ),
    "cookies": (
        Sense("web", before=r"\b(use|uses|using|these|browser|of) "),
        Sense("food", before=r"\b(the|bake|baked|chip|chocolate|sugar|oatmeal|butter|your) "),
    ),
    "flash": (
        Sense("flood or point", after=r"\s*(floods?|flooding|point)\b"),
        Sense("light or software", after=r"\s*(player|drive|memory|of|photography|[.,])"),
    ),
    "order": (
        Sense("purpose", before=r"\bin ", after=r"\s+(to|that)\b"),
        Sense("command or peace", before=r"\b(executive|court|and|an|the|this|world|public) "),
    ),
    "well": (
        Sense("also", before=r"\bas "),
        Sense("in a good way", before=r"\b(very|so|do|doing|did|works?|worked|pretty|go|be|it) "),
    ),
    "over": (
        Sense("during", after=r"\s+the (past|last|next|coming|course|years|weekend)\b"),
        Sense("more than", after=r"\s+([$£€]?\d|a (million|hundred|thousand|third|quarter))"),
    ),
    "about": (
        Sense("roughly", after=r"\s+([$£€]?\d|a (third|quarter|dozen)|half|one|two|three)\b"),
        Sense("concerning", after=r"\s+(the|his|her|their|how|what|it|this|that|our|my)\b"),
    ),
    "back": (
        Sense("return", after=r"\s+(to|in|from|into|home|on)\b"),
        Sense("rear", before=r"\b(the|his|her|my|their) "),
    ),
    "even": (
        Sense("although", after=r"\s+(if|though|when|as)\b"),
        Sense("to a degree", after=r"\s+(more|better|less|the|a|worse|greater|higher|in)\b"),
    ),
    "since": (
        Sense("after", after=r"\s+(then|\d{4}|last|january|may|june|july|september|october|the)\b"),
        Sense("because", after=r"\s+(it|he|she|we|they|you|this|there|i)\b"),
    ),
    "means": (
        Sense("instrument", before=r"\b(by|the|other|any|all|no) "),
        Sense("signifies", after=r"\s+(that|it|we|a|he|they|you|more)\b"),
    ),
    "like": (
        Sense("wish", before=r"\b(would|i|you|we|they|d|people|to) "),
        Sense("similar to", before=r"\b(look|looks|looked|is|was|just|more|things|feel) "),
    ),
    "kind": (
        Sense("sort", after=r"\s+of\b"),
        Sense("gentle", before=r"\b(very|so|be|and|was|were|is) ", after=r"(?!\s+of\b)"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Occurrence:
    """One place of a word: its row, the position of its last token, and the text around it."""

    row: int
    position: int
    before: str
    word: str
    after: str

    @classmethod
    def of(cls, row: int, position: int, before: str, token: str, after: str) -> Occurrence:
        """From a token's text, whose leading blanks stand before the word."""
        word = token.lstrip()
        return cls(row, position, before + token.removesuffix(word), word, after)


def spellings(tokenizer: Any, word: str) -> list[tuple[int, ...]]:
    """Token ids of a word with and without a blank before it, in lower and title case."""
    forms = [f"{blank}{form}" for form in (word, word.capitalize()) for blank in (" ", "")]
    ids = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
    return list(dict.fromkeys(ids))


def occurrences(
    rows: NDArray[Any], tokenizer: Any, word: str, first: int = 1, around: int = 16
) -> list[Occurrence]:
    """Every place of a whole word in token rows.

    rows: (r, c) token ids. Positions before `first` are left out, as in every statistic; a longer
    word that only begins or ends like this one is none. `around`: tokens decoded on either side.
    """
    found = []
    for ids in spellings(tokenizer, word):
        fits = np.ones((rows.shape[0], max(rows.shape[1] - len(ids) + 1, 0)), bool)
        for i, token in enumerate(ids):
            fits &= rows[:, i : i + fits.shape[1]] == token
        for row, start in np.argwhere(fits):
            end = int(start) + len(ids)
            if end - 1 < first:
                continue
            before = tokenizer.decode(rows[row, max(start - around, first) : start])
            after = tokenizer.decode(rows[row, end : end + around])
            itself = tokenizer.decode(rows[row, start:end])
            glued = before[-1:].isalnum() and not itself[:1].isspace()
            if glued or after[:1].isalnum():
                continue
            found.append(Occurrence.of(int(row), end - 1, before, itself, after))
    return sorted(found, key=lambda o: (o.row, o.position))


def places_of(contexts: Contexts, feature: int) -> list[Occurrence]:
    """Where a feature fires in the role `contexts`: the strongest token of each segment kept."""
    found = []
    for example in contexts.examples(feature):
        row, start = contexts.layout.place(example.segment)
        parts = (slice(example.peak), example.peak, slice(example.peak + 1, None))
        before, word, after = ("".join(example.pieces[part]) for part in parts)
        found.append(Occurrence.of(row, start + example.peak, before, word, after))
    return found


def label(occurrence: Occurrence, senses: Sequence[Sense]) -> int:
    """Index of the first sense that fits, -1 if none does."""
    for index, sense in enumerate(senses):
        if sense.matches(occurrence.before, occurrence.after):
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
    residuals, dtype = Residuals(run, role), product_dtype(run)
    rows: dict[str, list[sparse.csr_array]] = {name: [] for name in arms}
    order, start = np.argsort(places, kind="stable"), 0
    for index in range(residuals.n_chunks):
        stop = start + residuals.chunk_tokens(index)
        here = places[order]
        here = here[(here >= start) & (here < stop)] - start
        if len(here):
            z = normalise(residuals.chunk(index)[here].float())[0]
            for name, arm in arms.items():
                pre = pre_activations(arm.sae, z, dtype)
                assert arm.sae.threshold is not None
                acts = pre.float() * (pre > arm.sae.threshold)
                rows[name].append(sparse.csr_array(acts.cpu().numpy()))
        start = stop
    back = np.argsort(order, kind="stable")
    empty = {name: sparse.csr_array((0, arm.sae.n_features)) for name, arm in arms.items()}
    return {
        name: sparse.csr_array(sparse.vstack([empty[name], *parts]))[back]
        for name, parts in rows.items()
    }


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
    total, kinds = len(senses), int(senses.max()) + 1
    sizes = np.bincount(senses, minlength=kinds)
    pattern = sparse.csr_array(fires)
    pattern.data = np.ones_like(pattern.data, dtype=np.float64)
    alive = np.flatnonzero(pattern.sum(axis=0))
    if not len(alive):
        return Information(0.0, -1, _entropy(sizes), 0.0, 0.0, 1.0)
    pattern = pattern.tocsc()[:, alive].tocsr()

    def best(labels: NDArray[np.int64]) -> tuple[float, int]:
        """Largest information and its feature."""
        one_hot = sparse.csr_array((np.ones(total), (labels, np.arange(total))), (kinds, total))
        bits = mutual_information((one_hot @ pattern).toarray(), total, sizes)
        return float(bits.max()), int(bits.argmax())

    bits, feature = best(senses)
    rng = np.random.default_rng(seed)
    null = np.array([best(rng.permutation(senses))[0] for _ in range(permutations)])
    return Information(
        bits=bits,
        feature=int(alive[feature]),
        entropy=_entropy(sizes),
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
        if len(np.unique(senses[take])) < 2:
            continue
        before, after = (sense_information(x[take], senses[take], 0).bits for x in (a, b))
        differences.append(after - before)
    low, high = np.quantile(differences, [0.025, 0.975]) if differences else (np.nan, np.nan)
    return float(low), float(high)


def _entropy(sizes: NDArray[Any]) -> float:
    share = sizes[sizes > 0] / sizes.sum()
    return float(-(share * np.log2(share)).sum())


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
    rows = [("solo", feature, np.nan, fires_solo, solo.n1[feature])]
    rows += [
        ("joint", int(match), float(value), fires_joint, cross.n1_b[match])
        for match, value in zip(partners.match, partners.phi, strict=True)
    ]
    table = []
    for sae, index, value, fires, n1 in rows:
        fired = np.asarray(fires[:, [index]].todense()).ravel() != 0
        shares = [
            float(fired[labels == s].mean()) if (labels == s).any() else 0.0
            for s in range(len(names))
        ]
        word = phi(np.array([[fired.sum()]]), [n1], [len(labels)], solo.n_tokens)[0, 0]
        table.append(
            {
                "sae": sae,
                "feature": index,
                "phi": value,
                "phi_word": float(word),
                "rate": float(n1 / solo.n_tokens),
                **dict(zip(names, shares, strict=True)),
                "sense": belongs(shares, names),
            }
        )
    return pd.DataFrame(table)


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

    acts: by heading, (m,). Columns: sense, context (quoted), one a heading.
    """
    rows = []
    for sense, name in enumerate(names):
        for i in np.flatnonzero(labels == sense)[:per_sense]:
            one = found[i]
            text = f"{one.before[-40:]}«{one.word}»{one.after[:30]}"
            values = {heading: float(a[i]) or None for heading, a in acts.items()}
            rows.append({"sense": name, "context": quoted(text), **values})
    return pd.DataFrame(rows, columns=["sense", "context", *acts])


def quoted(text: str) -> str:
    """Text of a corpus as a code span: nothing in it is read as Markdown or HTML."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "ˋ").strip() + "`"
