# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Case studies: do features split by sense?
#
# The paper looks for solo features that fire together with several joint features, and finds among
# them words whose senses come apart: *too* as excess and as "also", *let* as suggestion and as
# permission, *cookies*, *flash* (§5.4, §6, App. E). Four chosen examples can show that splitting
# happens; they cannot show that joint training *causes* it. Two dictionaries of the same kind, from
# two seeds, split each other's features as well, and a feature that is split seen from one side is
# a merge seen from the other.
#
# So this page counts first, in both directions and against a pair of solo dictionaries, and looks
# at examples afterwards. If the paper is right, the counts lean to splits and the examples show
# senses.

# %% tags=["parameters"]
profile = "smollm2-135m"  # a file of profiles/, without .yml
overrides = {}  # changes by dotted key, such as {"training.lambda2": [0.3, 0.5]}
runs_dir = "../runs"  # where results are kept, seen from this notebook's folder

# %%
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Markdown, display
from scipy import sparse

from metasae_lib import interpret, measure, show
from metasae_lib.interpret import senses, splitting, steering
from metasae_lib.show import explorer, figures, load_published
from metasae_lib.subject import load_subject, load_tokens
from metasae_lib.train import load_arms

run = show.open_run(profile, overrides, runs_dir)
every_arm = load_arms(run)  # for the explorer; the rest looks at two seeds of the arms compared
arms = splitting.two_seeds(every_arm, run.profile.selected)
solo, joint = show.compared_arms(run)  # the solo arm and the selected joint arm, first seed
pairs = splitting.seed_pairs(arms, run.profile.selected)
counts = measure.scan_arms(run, arms)
cross = measure.cross_scan(run, arms, list(zip(pairs.a, pairs.b, strict=True)))
text = interpret.collect_contexts(run, every_arm)
peaks = {n: [t[0] if t else "" for t in explorer.peak_tokens(text[n])] for n in arms}
sides = {name: splitting.Side(counts[name], peaks[name]) for name in arms}
tokens, rule = load_tokens(run), splitting.Rule()
run.save_table("matches", measure.partners(cross, 2).round(4), "Strongest φ partners, all pairs")
Markdown(show.scale_of_run(run))

# %% [markdown]
# ## Splits and merges
#
# ```{margin} The paper says
# Splitting candidates "are solo features that co-activate strongly with multiple" joint
# features (§5.4); App. E shows four of them.
# ```
#
# A solo feature counts as **split** if its φ with at least two joint features is 0.3 or more, and
# those two do not fire together themselves (φ at most 0.5). A **merge** is the same seen from the
# joint side. As in the paper's released code, features that fire on more than 5% of the tokens are
# left out, and so are those that peak on punctuation or on a single character. Every clause is a
# field of `splitting.Rule`.
#
# Solo and joint training of one seed start from the same weights, which two solo seeds do not; so
# the pairs to compare are those of *different* seeds. Pairs of one seed are shown too.

# %%
rows = [
    splitting.count_directions(cross[a, b], sides[a], sides[b], rule)
    for a, b in zip(pairs.a, pairs.b, strict=True)
]
split_counts = pd.concat([pairs, pd.DataFrame(rows)], axis=1)
run.save_table("split_counts", split_counts, "Splits and merges in every pair of dictionaries")
found = splitting.headline(split_counts)
Markdown(f"**{found.sentence()}**")

# %% mystnb={"figure": {"name": "fig-splits", "caption": "Features of the solo dictionary that come apart in the other one (splits), and features of the other one that come apart in the solo dictionary (merges). Joint training un-blends only as far as the blue bars of solo and joint are longer than the orange ones, and longer than between two solo dictionaries."}, "image": {"alt": "Horizontal bars, two for each pair of dictionaries: number of splits and number of merges, for pairs of solo and joint, of the same start, and of two solo dictionaries."}}
figures.split_counts(split_counts)

# %%
variants = {f"φ ≥ {value:g}": {"min_phi": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5)}
variants |= {f"overlap ≤ {value:g}": {"max_partner_phi": value} for value in (0.1, 0.3, 1.0)}
variants |= {"three partners": {"n_partners": 3}, "all tokens": {"min_characters": 1}}
rows = []
for clause, changed in variants.items():
    for row in pairs[pairs.role != "same start"].itertuples():
        counted = splitting.count_directions(
            cross[row.a, row.b], sides[row.a], sides[row.b], replace(rule, **changed)
        )
        rows.append({"clause": clause, "pair": row.role, **counted})
choices = pd.DataFrame(rows).groupby(["clause", "pair"], sort=False).sum().reset_index()
run.save_table("split_choices", choices, "Splits and merges when one clause of the rule changes")
show.table(
    choices.assign(pair=choices.pair.map({"joint": "solo, joint", "null": "solo, solo"})),
    "The same counts when one clause changes, summed over pairs of different seeds",
    "tab-split-choices",
)

# %% [markdown]
# ## The strongest candidates
#
# The paper's own list: solo features ranked by their φ with the second-strongest joint partner,
# both dictionaries from the first seed.

# %%
candidates = splitting.find(cross[solo, joint], sides[solo], sides[joint], rule)
told = pd.DataFrame(columns=["arm", "feature", "explanation", "fuzz"])
if run.has_table("autointerp_scores"):  # of several judges, the one with a language model
    scores = run.load_table("autointerp_scores").sort_values("judge", key=lambda j: j == "lexical")
    told = scores.assign(
        arm=scores.kind.map({"solo": solo, "joint": joint}), fuzz=scores.fuzzing,
        explanation=scores.explanation.map(interpret.in_words, na_action="ignore"),
    )  # fmt: skip
    told = told.drop_duplicates(["arm", "feature"])
for side, prefix, arm in (("feature", "", solo), ("partner", "partner_", joint)):
    named = told[told.arm == arm][["feature", "explanation", "fuzz"]].add_prefix(prefix)
    named = named.rename(columns={f"{prefix}feature": side}).astype({side: int})
    candidates = candidates.merge(named, on=side, how="left")
rows = [arms[a].sae.W_dec.detach() for a in (solo, joint)]
rows = [w[candidates[c].to_numpy()] for w, c in zip(rows, ("feature", "partner"), strict=True)]
candidates["cosine"] = (rows[0] * rows[1]).sum(1).tolist()  # rows have length 1
run.save_table("splitting", candidates, "Splitting candidates: solo features, joint partners, φ")
shown = splitting.listed(candidates)
display(
    show.table(
        shown.dropna(axis=1, how="all"),
        "The ten strongest candidates: solo features and their joint partners; φ and cosine "
        "of decoder rows with the solo feature, overlap: largest φ with a stronger partner",
        "tab-candidates",
        "wide",
    )
    if len(shown)
    else Markdown("**No solo feature of this run is a candidate under the rule.**")
)

# %% [markdown]
# And in context, for the first three: places where the solo feature fires, grouped by the joint
# partner that is strongest there. If the partners are its senses, the groups differ in meaning.

# %%
two, tables = {name: arms[name] for name in (solo, joint)}, []
for feature, group in candidates[candidates["rank"] <= 3].groupby("feature", sort=False):
    places, partners = senses.places_of(text[solo], feature), group.partner.tolist()
    acts = senses.firing_at(run, two, "contexts", places)
    mine, theirs = acts[solo][:, [feature]].toarray(), acts[joint][:, partners].toarray()
    strongest = np.where(theirs.any(axis=1), theirs.argmax(axis=1), len(partners))
    heads = [f"joint {partner}" for partner in partners]
    beside = {f"solo {feature}": mine[:, 0], **dict(zip(heads, theirs.T, strict=True))}
    inside = senses.side_by_side(places, strongest, [*heads, "no partner"], beside)
    tables.append(
        show.table(
            inside.rename(columns={"sense": "strongest"}),
            f"Solo feature {feature} in context, and its joint partners",
            f"tab-candidate-{len(tables) + 1}",
        )
    )
display(*tables)

# %% [markdown]
# ## What the paper's own tables imply
#
# φ is a correlation, and correlations constrain each other: two features that both correlate with a
# third one must correlate with *each other* at least by
# $\varphi_a\varphi_b - \sqrt{(1-\varphi_a^2)(1-\varphi_b^2)}$. Where that is above zero, the two
# fire together more often than by chance: they cannot be two senses that exclude each other.

# %%
published = load_published().frame()
printed = published[(published.section == "case study") & published.id.str.endswith(".phi")]
words = printed.id.str.extract(r"\.case\.(?P<word>\w+)\.joint-(?P<feature>\d+)")
printed = printed.join(words)
rows = [
    (word, a.feature, b.feature, a.value, b.value, splitting.least_overlap(a.value, b.value))
    for word, part in printed.groupby("word", sort=False)
    for i, a in enumerate(part.itertuples())
    for b in list(part.itertuples())[i + 1 :]
]
implied = pd.DataFrame(rows, columns=["word", "first", "second", "φ", "φ ", "least φ of the two"])
run.save_table("implied_overlap", implied, "Least φ between the paper's joint features of a word")
forced = list(dict.fromkeys(implied[implied["least φ of the two"] > 0].word))
display(
    show.table(implied, "The paper's joint features and the least they overlap", "tab-implied"),
    Markdown(
        f"So for {' and '.join(f'*{word}*' for word in forced) or 'no word'} at least two of the "
        "joint features that the paper calls different senses must fire on shared tokens."
    ),
)

# %% [markdown]
# ## Tables 2 to 5: the paper's words in this model
#
# For each word: the solo feature whose firing follows the word most closely, and its strongest
# joint partners. Senses have no labels; each stands on a stated pattern in the neighbouring words
# (`senses.WORDS`), *also* for instance on a full stop or comma after *too*. A feature belongs to a
# sense if 80% of its firing does, senses equally weighted. *cookies* and *flash* are the paper's
# words on Gemma, and are looked up on Gemma profiles.

# %%
numbers = {"too": 2, "let": 3} | (
    {"cookies": 4, "flash": 5} if "gemma" in run.profile.model.source else {}
)
ids, verdicts, values = tokens.rows("scan"), [], []
heading = {"phi": "φ with the solo feature", "phi_word": "φ with the word", "sense": "belongs to"}
for word, number in numbers.items():
    places = senses.occurrences(ids, tokens.tokenizer, word, int(run.profile.text.skip_first))
    kinds = senses.WORDS[word]
    names, labels = [k.name for k in kinds], np.array([senses.label(o, kinds) for o in places], int)
    if np.bincount(labels[labels >= 0], minlength=2).min() < 5:
        verdicts.append(f"“{word}” has too few places in the scan text ({len(places)}).")
        continue
    acts = senses.firing_at(run, two, "scan", places)
    study = senses.case_study(
        cross[solo, joint], counts[solo], acts[solo], acts[joint], labels, names
    )
    run.save_table(f"table_{number}", study, f"Table {number}: “{word}” in this model")
    verdicts.append(senses.split_sentence(word, study))
    theirs = printed[printed.word == word].sort_values("value", ascending=False)
    values += list(zip(theirs.id, study.phi.dropna(), strict=False))
    heads = {f"{r.sae} {r.feature}": acts[solo if r.sae == "solo" else joint][:, [r.feature]]
             for r in study.itertuples()}  # fmt: skip
    beside = {head: a.toarray().ravel() for head, a in heads.items()}
    display(
        Markdown(f"### “{word}”"),
        show.table(study.rename(columns=heading), f"Table {number} for this model: “{word}”",
                     f"tab-{word}"),
        show.table(theirs[["feature", "value", "note"]], f"The paper's Table {number}: joint "
                     "features, φ with its solo feature, sense", f"tab-{word}-paper"),
        show.table(senses.side_by_side(places, labels, names, beside),
                     f"“{word}” in context, and what fires", f"tab-{word}-contexts"),
    )  # fmt: skip
Markdown("\n\n".join(verdicts))

# %% [markdown]
# ## A check that does not choose its examples
#
# A fixed list of words with several senses, fixed before any result: how much does the best single
# feature of each dictionary tell of the sense (mutual information)? An atomic feature would be an
# indicator of one sense and tell everything. The best of many features always tells something, so
# the null shuffles senses among the places and takes the best feature again. Places are those of
# all held-out text; words with fewer than 15 places of either sense are left out.

# %%
rows, few = [], []
for word, kinds in senses.WORDS.items():
    all_acts, all_labels = {name: [] for name in arms}, []
    for role in ("scan", "contexts"):
        places = senses.occurrences(
            tokens.rows(role), tokens.tokenizer, word, int(run.profile.text.skip_first)
        )
        labels = np.array([senses.label(o, kinds) for o in places], int)
        labelled = [o for o, k in zip(places, labels, strict=True) if k >= 0]
        for name, a in senses.firing_at(run, arms, role, labelled).items():
            all_acts[name].append(a)
        all_labels.append(labels[labels >= 0])
    labels = np.concatenate(all_labels)
    _, labels = np.unique(labels, return_inverse=True)
    if len(np.bincount(labels)) < 2 or np.bincount(labels).min() < 15:
        few.append(word)
        continue
    fires = {name: sparse.csr_array(sparse.vstack(a)) for name, a in all_acts.items()}
    low, high = senses.bootstrap_difference(fires[solo], fires[joint], labels, draws=100)
    for name in arms:
        info = senses.sense_information(fires[name], labels)
        about = {"word": word, "places": len(labels), "arm": name, "kind": arms[name].spec.kind}
        rows.append(about | vars(info) | {"share": info.share, "low": low, "high": high})
columns = ["word", "places", "arm", "kind", "bits", "feature", "entropy", "null_mean", "null_high"]
info = pd.DataFrame(rows, columns=[*columns, "p", "share", "low", "high"])
info["chance"] = (info.null_high - info.null_mean) / (info.entropy - info.null_mean)
run.save_table("sense_information", info, "Sense information of the best feature, every arm")
Markdown(f"Too rare in this run's held-out text: {', '.join(few) or 'none'}.")

# %%
by_kind = info.pivot_table(index="word", columns="kind", values="share")
sense_sentence = "No word of the list is frequent enough in this run's held-out text."
if len(info):
    change = by_kind.joint - by_kind.solo
    spread = 2 * change.std() / np.sqrt(len(change))
    clear = abs(change.mean()) > spread
    sense_sentence = (
        f"Joint features tell more of the sense for {int((change > 0).sum())} of {len(change)} "
        f"words. The mean share changes by {change.mean():+.3f}, with twice its standard error over "
        f"words at {spread:.3f}: "
        + ("a difference." if clear else "not a difference that these words can show.")
    )
Markdown(sense_sentence)

# %% mystnb={"figure": {"name": "fig-senses", "caption": "How much the best single feature of each dictionary tells of a word's sense: 0 is what shuffled senses give, 1 is everything. Each mark is a dictionary. If joint training separates senses, its squares lie to the right of the solo circles, word after word."}, "image": {"alt": "Dot plot with one row per word: share of the sense information in the best feature of each solo and joint dictionary, and the 95% quantile of the shuffled null."}}
figures.sense_information(info) if len(info) else None

# %% [markdown]
# ## Steering: take it out, or double it
#
# The paper's introduction argues that a blended feature steers too much at once. So here is the use
# itself, small: the strongest candidate's solo feature and its joint partner are removed from the
# residual stream, or doubled, wherever they fire in a row of held-out text up to the place where the
# solo feature is strongest, and the probabilities of the next token are read off.
#
# ```{tip}
# **Change this yourself.** Any feature and factor: `steering.scaled(arms[joint].sae, 123, 4.0)`;
# any text: `tokens.tokenizer("...", return_tensors="pt").input_ids[0]`.
# ```

# %%
if len(candidates):
    feature, partner = (int(candidates[side].iloc[0]) for side in ("feature", "partner"))
else:  # no candidate: a solo feature that fires, and its strongest joint partner
    best = measure.top_matches(cross[solo, joint], 1).sort_values("phi").iloc[-1]
    feature, partner = int(best.feature), int(best.match)
example = text[solo].top(feature, 1)[0]
row, column = text[solo].layout.place(example.segment)
prompt = torch.tensor(tokens.rows("contexts")[row, : column + example.peak + 1].tolist())
first = int(run.profile.text.skip_first)
replacements = {
    f"{name} {factor}": steering.scaled(arms[arm].sae, i, scale, first)
    for name, arm, i in (("solo", solo, feature), ("joint", joint, partner))
    for factor, scale in (("removed", 0.0), ("doubled", 2.0))
}
steered = steering.next_tokens(
    load_subject(run.profile), prompt, replacements, lambda i: tokens.tokenizer.decode([i])
)
run.save_table("steering", steered, "Next-token probabilities, a feature removed or doubled")
changes = steered[["token", "unchanged", *(f"change {name}" for name in replacements)]]
display(
    Markdown(f"The row ends with: {senses.quoted(''.join(example.pieces[: example.peak + 1]))} …"),
    show.table(
        changes.assign(token=changes.token.map(senses.quoted)).head(10),
        f"Next token after steering solo feature {feature} and joint feature {partner}: "
        "probability, and its change in percentage points",
        "tab-steering",
    ),
)

# %% [markdown]
# ## The feature explorer
#
# Every feature of every arm, with its contexts, its partner in the other dictionary and the features
# it fires with: search, filter, and share the address of what you find. It is a page of its own in
# the book that needs no server.

# %%
pages = explorer.collect(run, every_arm, text, (solo, joint), told if len(told) else None)
name = run.profile.name
back = f"../../{name}/05_case_studies.html"
sizes = explorer.write(run.folder / "explorer", pages, name, run.profile.about, back)
display(
    HTML(f'<p><a href="../explorer/{name}/index.html">Open the feature explorer of {name}</a></p>'),
    Markdown(
        f"{sum(sizes.values()) / 2**20:.1f} MiB in all. Arms that ended with the same weights as "
        "another (controls without a penalty) are left out."
    ),
)

# %%
cases = published.loc[published.id.str.endswith(".phi"), ["id"]]
ours = cases.merge(pd.DataFrame(values, columns=["id", "value"]), how="left")
ours = ours.assign(low=np.nan, high=np.nan, words="")
run.save_table("case_study_values", ours, "φ of our joint partners, in the order of the paper's")
sentences = [found.sentence(), *verdicts, sense_sentence]
run.save_json("case_study_sentences", [s.replace("**", "") for s in sentences])
display(
    Markdown("## What a reader may conclude\n\n" + "\n".join(f"- {s}" for s in sentences)),
    show.paper_against_ours(run, "*.case.*", label="tab-paper-05"),
    show.provenance(run),
    show.downloads(
        run, "matches", "split_counts", "split_choices", "splitting", "implied_overlap",
        "sense_information", "steering", "case_study_values",
    ),
)  # fmt: skip
