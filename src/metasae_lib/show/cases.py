"""The case studies' tables: splits and their features in context, words and their senses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from metasae_lib.interpret import Contexts, in_words, senses, splitting
from metasae_lib.measure import Counts, CrossCounts, phi, top_matches
from metasae_lib.measure.structure import Structure
from metasae_lib.show.published import load_published
from metasae_lib.show.tables import compared_arms
from metasae_lib.show.text import literal, table
from metasae_lib.study import Role, Run
from metasae_lib.study.known import attribution
from metasae_lib.subject import Tokens
from metasae_lib.train import Arm

_HELD_OUT: tuple[Role, ...] = ("scan", "contexts")
_FEWEST = 5  # places of each sense without which a word is not looked up
_RARE = 15  # places of each sense below which a word tells nothing
_PAPER_TABLES = {"too": 2, "let": 3, "cookies": 4, "flash": 5}  # the last two on Gemma


def split_counts(
    pairs: pd.DataFrame,
    cross: Mapping[tuple[str, str], CrossCounts],
    sides: Mapping[str, splitting.Side],
) -> pd.DataFrame:
    """Pairs of dictionaries (columns role, a, b) with `splitting.count_directions` of each."""
    return _counted(pairs, cross, sides, {"": splitting.Rule()}).drop(columns="clause")


def _counted(
    pairs: pd.DataFrame,
    cross: Mapping[tuple[str, str], CrossCounts],
    sides: Mapping[str, splitting.Side],
    rules: Mapping[str, splitting.Rule],
) -> pd.DataFrame:
    """`splitting.count_directions` of every pair under every rule; columns clause, role, a, b..."""
    rows = [
        {"clause": clause, "role": role, "a": a, "b": b, **found}
        for role, a, b in pairs[["role", "a", "b"]].itertuples(index=False)
        for clause, found in zip(
            rules,
            splitting.count_directions(cross[a, b], sides[a], sides[b], list(rules.values())),
            strict=True,
        )
    ]
    return pd.DataFrame(rows)


def split_choices(
    pairs: pd.DataFrame,
    cross: Mapping[tuple[str, str], CrossCounts],
    sides: Mapping[str, splitting.Side],
    variants: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:
    """`split_counts` under changed clauses of the rule, summed over pairs of one role.

    Solo against joint and solo against solo; of the same start where there is one seed alone.
    variants: by name, the fields of `splitting.Rule` that change. Columns: clause, pair (the role),
    splits, merges, eligible_a, eligible_b.
    """
    others = pairs[pairs.role.isin(["joint", "null"])]
    rules = {name: splitting.Rule(**changed) for name, changed in variants.items()}
    both = _counted(pairs if others.empty else others, cross, sides, rules)
    both = both.rename(columns={"role": "pair"})
    order = {name: place for place, name in enumerate(variants)}
    both = both.sort_values("clause", key=lambda names: names.map(order), kind="stable")
    return both.groupby(["clause", "pair"], sort=False).sum(numeric_only=True).reset_index()


def explanations(run: Run) -> pd.DataFrame:
    """What a judge says of the compared arms' features, of several the one with a language model.

    Columns: arm, feature, explanation, fuzz; no rows if `04_autointerp` has not been run.
    """
    columns = ["arm", "feature", "explanation", "fuzz"]
    if not run.has_table("autointerp_scores"):
        return pd.DataFrame(columns=columns)
    scores = run.load_table("autointerp_scores").sort_values("judge", key=lambda j: j == "lexical")
    told = scores.assign(
        fuzz=scores.fuzzing,
        explanation=scores.explanation.map(in_words, na_action="ignore"),
    )
    return told.drop_duplicates(["arm", "feature"])[columns]


def explained_candidates(
    found: pd.DataFrame, told: pd.DataFrame, arms: Mapping[str, Arm]
) -> pd.DataFrame:
    """Candidates of `splitting.find` with what is known of both features.

    told: `explanations`. arms: solo and joint. Adds explanation, fuzz, the same as `partner_...`,
    and cosine (of the decoder rows).
    """
    rows = []
    for kind, side, prefix in (("solo", "feature", ""), ("joint", "partner", "partner_")):
        named = told[told.arm == arms[kind].spec.name][["feature", "explanation", "fuzz"]]
        named = named.add_prefix(prefix).rename(columns={f"{prefix}feature": side})
        found = found.merge(named.astype({side: int}), on=side, how="left")
        rows.append(arms[kind].sae.directions.detach()[found[side].to_numpy()])
    return found.assign(cosine=(rows[0] * rows[1]).sum(1).tolist())  # rows have length 1


def listed_candidates(candidates: pd.DataFrame) -> Markdown:
    """The ten strongest candidates for reading (`splitting.listed`)."""
    shown = splitting.listed(candidates)
    if shown.empty:
        return Markdown("**No solo feature of this run is a candidate under the rule.**")
    caption = (
        "The ten strongest candidates: solo features and their joint partners; φ and cosine of "
        "decoder rows with the solo feature, overlap: largest φ with a stronger partner"
    )
    return table(shown.dropna(axis=1, how="all"), caption, "tab-candidates", "wide")


def candidate_contexts(
    run: Run, arms: Mapping[str, Arm], contexts: Contexts, candidates: pd.DataFrame, count: int = 3
) -> list[Markdown]:
    """Where the first `count` solo features fire, grouped by the joint partner strongest there.

    arms: solo and joint; contexts: of the solo arm.
    """
    tables = []
    first = candidates[candidates["rank"] <= count]
    for number, feature in enumerate(first.feature.unique(), start=1):
        partners = first[first.feature == feature].partner
        places = senses.places_of(contexts, feature)
        fires = senses.firing_at(run, arms, "contexts", places)
        solo, joint = _acts(fires, "solo", [feature]), _acts(fires, "joint", partners)
        theirs = np.array(list(joint.values()))
        strongest = np.where(theirs.any(axis=0), theirs.argmax(axis=0), len(theirs))
        shown = _with_origin(
            senses.side_by_side(places, strongest, [*joint, "no partner"], solo | joint)
        )
        caption = f"Solo feature {feature} in context, and its joint partners"
        shown = shown.rename(columns={"sense": "strongest"})
        tables.append(table(shown, caption, f"tab-candidate-{number}"))
    return tables


def _with_origin(contexts: pd.DataFrame) -> pd.DataFrame:
    """`senses.side_by_side` with the origin of each context in its own cell, which saves width."""
    told = contexts.context + " " + contexts.text.map(literal)
    return contexts.assign(context=told).drop(columns="text")


def _acts(
    fires: Mapping[str, sparse.csr_array], sae: str, features: Iterable[int]
) -> dict[str, NDArray[Any]]:
    """Activations of some features of one arm, by heading."""
    return {f"{sae} {i}": fires[sae][:, [i]].toarray().ravel() for i in features}


def printed_partners() -> pd.DataFrame:
    """The paper's joint features of Tables 2 to 5: its values with the columns word, feature."""
    published = load_published().frame()
    phi = published[(published.section == "case study") & published.id.str.endswith(".phi")]
    return phi.join(phi.id.str.extract(r"\.case\.(?P<word>\w+)\.joint-(?P<feature>\d+)"))


def implied_overlap(printed: pd.DataFrame) -> pd.DataFrame:
    """The least φ that each two of the paper's joint features of a word have with each other."""
    rows = [
        (word, a, b, phi_a, phi_b, splitting.least_overlap(phi_a, phi_b))
        for word, part in printed.groupby("word", sort=False)
        for (a, phi_a), (b, phi_b) in combinations(zip(part.feature, part.value, strict=True), 2)
    ]
    return pd.DataFrame(rows, columns=["word", "first", "second", "φ", "φ ", "least φ of the two"])


@dataclass(frozen=True)
class WordStudy:
    """A word of the paper's table `number` in this model: what was found, in a sentence.

    table: of `senses.case_study`; contexts: places of the word and what fires there. None and none
    where the word is too rare.
    """

    word: str
    number: int
    sentence: str
    table: pd.DataFrame | None = None
    contexts: pd.DataFrame | None = None

    def shown(self, printed: pd.DataFrame) -> list[Markdown]:
        """A heading and three tables: this model's, the paper's (`printed_partners`), contexts."""
        if self.table is None or self.contexts is None:
            return []
        names = {"phi": "φ with the solo feature", "phi_word": "φ with the word",
                 "sense": "belongs to"}  # fmt: skip
        theirs = _strongest_first(printed, self.word)[["feature", "value", "note"]]
        number, word = self.number, f"“{self.word}”"
        paper = f"The paper's Table {number}: joint features, φ with its solo feature, sense"
        return [
            Markdown(f"### {word}"),
            table(self.table.rename(columns=names), f"Table {number} for this model: {word}",
                  f"tab-{self.word}"),
            table(theirs, paper, f"tab-{self.word}-paper"),
            table(self.contexts, f"{word} in context, and what fires", f"tab-{self.word}-contexts"),
        ]  # fmt: skip


def _strongest_first(printed: pd.DataFrame, word: str) -> pd.DataFrame:
    return printed[printed.word == word].sort_values("value", ascending=False)


def _places(
    run: Run, tokens: Tokens, word: str, role: Role
) -> tuple[list[senses.Occurrence], NDArray[np.int64]]:
    """Every place of a word in a role, and its sense (-1 for none)."""
    first = int(run.profile.text.skip_first)
    places = []
    for one in senses.occurrences(tokens.rows(role), tokens.tokenizer, word, first):
        around = one.position - senses.AROUND, one.position + senses.AROUND
        sources = tokens.sources(role, one.row, *around)
        places.append(replace(one, origin=attribution(sources)))
    return places, np.array([senses.label(o, senses.WORDS[word]) for o in places], int)


def word_studies(
    run: Run, tokens: Tokens, arms: Mapping[str, Arm], cross: CrossCounts, counts: Counts
) -> list[WordStudy]:
    """The paper's words in this model; *cookies* and *flash* on Gemma profiles alone.

    arms: solo and joint; cross: the counts between them; counts: those of the solo arm.
    """
    studies = []
    for word, number in _PAPER_TABLES.items():
        if number > 3 and "gemma" not in run.profile.model.source:
            continue
        places, labels = _places(run, tokens, word, "scan")
        rarer = int(np.bincount(labels[labels >= 0], minlength=2).min())
        if rarer < _FEWEST:
            few = (
                f"“{word}” stands {len(places)} times in the {tokens.n_tokens('scan'):,} tokens of "
                f"the scan text, {rarer} of them known to be of its rarer sense; {_FEWEST} of each "
                f"sense are asked for, so a larger text.roles.scan is needed to look it up."
            )
            studies.append(WordStudy(word, number, few))
            continue
        names = [sense.name for sense in senses.WORDS[word]]
        fires = senses.firing_at(run, arms, "scan", places)
        study = senses.case_study(cross, counts, fires["solo"], fires["joint"], labels, names)
        acts = dict[str, NDArray[Any]]()
        for sae, part in study.groupby("sae", sort=False):
            acts |= _acts(fires, str(sae), part.feature)
        contexts = _with_origin(senses.side_by_side(places, labels, names, acts))
        studies.append(WordStudy(word, number, senses.split_sentence(word, study), study, contexts))
    return studies


def case_values(printed: pd.DataFrame, studies: list[WordStudy]) -> pd.DataFrame:
    """φ of our joint partners beside the paper's, strongest first. Columns: id, value, low, high,
    words."""
    ours: list[tuple[str, float]] = []
    for study in studies:
        if study.table is not None:
            theirs = _strongest_first(printed, study.word).id
            ours += zip(theirs, study.table.phi.dropna(), strict=False)
    values = printed[["id"]].merge(pd.DataFrame(ours, columns=["id", "value"]), how="left")
    return values.assign(low=np.nan, high=np.nan, words="")


def sense_table(
    run: Run, tokens: Tokens, arms: Mapping[str, Arm]
) -> tuple[pd.DataFrame, list[str]]:
    """Sense information of the best feature of every arm, by word; and the words that are too rare.

    Places are those of all held-out text. Columns: word, places, arm, kind, those of
    `senses.Information`, share, low and high (bits of joint minus solo), chance (the null's 95%
    quantile on the scale of share).
    """
    rows, few, (solo, joint) = [], [], compared_arms(run)
    for word in senses.WORDS:
        found, fires = [], []
        for role in _HELD_OUT:
            places, labels = _places(run, tokens, word, role)
            told = [o for o, k in zip(places, labels, strict=True) if k >= 0]
            fires.append(senses.firing_at(run, arms, role, told))
            found.append(labels[labels >= 0])
        _, labels = np.unique(np.concatenate(found), return_inverse=True)
        sizes = np.bincount(labels)
        if len(sizes) < 2 or sizes.min() < _RARE:
            few.append(word)
            continue
        fire = {n: sparse.csr_array(sparse.vstack([part[n] for part in fires])) for n in arms}
        low, high = senses.bootstrap_difference(fire[solo], fire[joint], labels, draws=100)
        for name, arm in arms.items():
            info = senses.sense_information(fire[name], labels)
            about = {"word": word, "places": len(labels), "arm": name, "kind": arm.spec.kind}
            rows.append(about | vars(info) | {"share": info.share, "low": low, "high": high})
    columns = ["word", "places", "arm", "kind", *senses.Information.__annotations__]
    frame = pd.DataFrame(rows, columns=[*columns, "share", "low", "high"])
    frame["chance"] = (frame.null_high - frame.null_mean) / (frame.entropy - frame.null_mean)
    return frame, few


def sense_sentence(info: pd.DataFrame) -> str:
    """Whether joint features tell more of the sense than solo ones, drawn from `sense_table`."""
    if info.empty:
        return "No word of the list is frequent enough in this run's held-out text."
    by_kind = info.pivot_table(index="word", columns="kind", values="share")
    change = by_kind.joint - by_kind.solo
    spread = 2 * change.std() / np.sqrt(len(change))
    clear = abs(change.mean()) > spread
    return (
        f"Joint features tell more of the sense for {int((change > 0).sum())} of {len(change)} "
        f"words. The mean share changes by {change.mean():+.3f}, with twice its standard error "
        f"over words at {spread:.3f}: "
        + ("a difference." if clear else "not a difference that these words can show.")
    )


def drawn_cluster(
    found: Structure, counts: Counts, contexts: Contexts, most: int = 8
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The largest cluster of at most `most` features: what they are, and their φ with each other.

    Columns of the first: feature, peak (token of its strongest segment), rate, context (that
    segment, quoted, and its text's name and licence). The second has a row and a column
    a feature, and the column feature. Both are empty without one.
    """
    small = [cluster for cluster in found.clusters() if len(cluster) <= most]
    features = small[0] if small else np.array([], int)
    rows = []
    for i in features[np.argsort(-counts.n1[features])].tolist():
        one = contexts.top(i, 1)
        peak = senses.quoted(one[0].pieces[one[0].peak]) if one else ""
        text = f"{senses.quoted(one[0].text)} ({one[0].origin})" if one else ""
        rows.append((i, peak, counts.rates[i], text))
    about = pd.DataFrame(rows, columns=["feature", "peak", "rate", "context"])
    order, n1 = about.feature.to_numpy(int), counts.n1
    values = phi(counts.n11[np.ix_(order, order)], n1[order], n1[order], counts.n_tokens)
    peaks = about.peak.str.strip("`")
    names = [f"{i} “{peak}”" for i, peak in zip(order, peaks, strict=True)]
    return about, pd.DataFrame(values, names, order).reset_index(names="feature")


def steering_row(tokens: Tokens, contexts: Contexts, feature: int) -> tuple[Tensor, Markdown]:
    """A row of held-out text up to where a feature is strongest: token ids, and its end."""
    example = contexts.top(feature, 1)[0]
    row, column = contexts.layout.place(example.segment)
    ids = tokens.rows("contexts")[row, : column + example.peak + 1].tolist()
    end = senses.quoted("".join(example.pieces[: example.peak + 1]))
    return torch.tensor(ids), Markdown(f"The row ends with: {end} … ({example.origin})")


def strongest_pair(candidates: pd.DataFrame, cross: CrossCounts) -> tuple[int, int]:
    """The first candidate and its partner; without one, the two features with the largest φ."""
    if len(candidates):
        return int(candidates.feature.iloc[0]), int(candidates.partner.iloc[0])
    best = top_matches(cross, 1).sort_values("phi").iloc[-1]
    return int(best.feature), int(best.match)


def steered_tokens(steered: pd.DataFrame, feature: int, partner: int) -> Markdown:
    """The ten likeliest tokens of `steering.next_tokens`: probability, and its changes."""
    changes = steered.filter(regex="^(token|unchanged|change .*)$").head(10)
    caption = (
        f"Next token after steering solo feature {feature} and joint feature {partner}: "
        "probability, and its change in percentage points"
    )
    return table(changes.assign(token=changes.token.map(senses.quoted)), caption, "tab-steering")
