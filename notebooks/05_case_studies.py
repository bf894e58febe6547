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

# %% tags=["hide-input"]
from IPython.display import HTML, Markdown, display

from metasae_lib import interpret, measure, show
from metasae_lib.interpret import splitting, steering
from metasae_lib.show import cases, explorer, figures
from metasae_lib.subject import load_tokens, subject_of
from metasae_lib.train import load_arms

run = show.open_run(profile, overrides, runs_dir)
tokens = load_tokens(run)

# %%
every_arm = load_arms(run)  # for the explorer; the rest looks at two seeds of the arms compared
arms = splitting.two_seeds(every_arm, run.profile.selected)
solo, joint = show.compared_arms(run)  # the solo arm and the selected joint arm, first seed
two = {"solo": arms[solo], "joint": arms[joint]}
pairs = splitting.seed_pairs(arms, run.profile.selected)
counts = measure.scan_arms(run, arms)
cross = measure.cross_scan(run, arms, list(zip(pairs.a, pairs.b, strict=True)))
text = interpret.collect_contexts(run, every_arm)
peaks = {n: [t[0] if t else "" for t in explorer.peak_tokens(text[n])] for n in arms}
sides = {name: splitting.Side(counts[name], peaks[name]) for name in arms}
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
# the pairs to compare are those of *different* seeds. Pairs of one seed are shown too, and solo
# against the penalty's competitors, where the run trains them.

# %% mystnb={"figure": {"name": "fig-splits", "caption": "Features of the solo dictionary that come apart in the other one (splits), and features of the other one that come apart in the solo dictionary (merges). Joint training un-blends only as far as the blue bars of solo and joint are longer than the orange ones, and longer than between two solo dictionaries."}, "image": {"alt": "Horizontal bars, two for each pair of dictionaries: number of splits and number of merges, for pairs of solo and joint, of the same start, of two solo dictionaries, and of solo and other methods."}}
split_counts = cases.split_counts(pairs, cross, sides)
found = splitting.pool(split_counts)  # in words at the end of the page
figures.split_counts(split_counts)

# %%
variants = {f"φ ≥ {value:g}": {"min_phi": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5)}
variants |= {f"overlap ≤ {value:g}": {"max_partner_phi": value} for value in (0.1, 0.3, 1.0)}
variants |= {"three partners": {"n_partners": 3}, "all tokens": {"min_characters": 1}}
choices = cases.split_choices(pairs, cross, sides, variants)
show.table(
    choices.replace({"pair": {"joint": "solo, joint", "null": "solo, solo"}}),
    "The same counts when one clause changes, summed over pairs of different seeds",
    "tab-split-choices",
)

# %% [markdown]
# ## The strongest candidates
#
# The paper's own list: solo features ranked by their φ with the second-strongest joint partner,
# both dictionaries from the first seed.

# %%
told = cases.explanations(run)
candidates = splitting.find(cross[solo, joint], sides[solo], sides[joint])
candidates = cases.explained_candidates(candidates, told, two)
cases.listed_candidates(candidates)

# %% [markdown]
# And in context, for the first three: places where the solo feature fires, grouped by the joint
# partner that is strongest there. If the partners are its senses, the groups differ in meaning.

# %%
display(*cases.candidate_contexts(run, two, text[solo], candidates))

# %% [markdown]
# ## A cluster
#
# Splits look across dictionaries; within one, features that fire together make clusters
# ([](03_cooccurrence.ipynb) counts them). This is the largest of at most eight features in the solo
# arm: what a training meant to pull features apart would have to take to pieces.

# %% mystnb={"figure": {"name": "fig-cluster", "caption": "A cluster of the solo dictionary: φ of its features with each other, each named by the token on which it is strongest. Light squares are pairs that nearly always fire together; features are joined by pairs above chance with φ of 0.5 or more, directly or through others."}, "image": {"alt": "Square of coloured cells with a number in each, one row and one column for each feature of a cluster: phi of the pair."}}
found_together = measure.structure(counts[solo], measure.summarise(counts[solo]))
cluster, cluster_phi = cases.drawn_cluster(found_together, counts[solo], text[solo])
figures.cluster(cluster_phi) if len(cluster) else None

# %%
show.table(cluster, "The features of the cluster, and where each is strongest", "tab-cluster")

# %% [markdown]
# ## What the paper's own tables imply
#
# φ is a correlation, and correlations constrain each other: two features that both correlate with a
# third one must correlate with *each other* at least by
# $\varphi_a\varphi_b - \sqrt{(1-\varphi_a^2)(1-\varphi_b^2)}$. Where that is above zero, the two
# fire together more often than by chance: they cannot be two senses that exclude each other.

# %%
printed = cases.printed_partners()
implied = cases.implied_overlap(printed)
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
studies = cases.word_studies(run, tokens, two, cross[solo, joint], counts[solo])
for study in studies:
    display(*study.shown(printed))
Markdown("\n\n".join(study.sentence for study in studies))

# %% [markdown]
# ## A check that does not choose its examples
#
# A fixed list of words with several senses, fixed before any result: how much does the best single
# feature of each dictionary tell of the sense (mutual information)? An atomic feature would be an
# indicator of one sense and tell everything. The best of many features always tells something, so
# the null shuffles senses among the places and takes the best feature again. Places are those of
# all held-out text; words with fewer than 15 places of either sense are left out.

# %%
info, few = cases.sense_table(run, tokens, arms)
display(
    Markdown(f"Too rare in this run's held-out text: {', '.join(few) or 'none'}."),
    Markdown(cases.sense_sentence(info)),
)

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
feature, partner = cases.strongest_pair(candidates, cross[solo, joint])
prompt, end = cases.steering_row(tokens, text[solo], feature)
first = int(run.profile.text.skip_first)
replacements = {
    f"{name} {factor}": steering.scaled(arms[arm].sae, i, scale, first)
    for name, arm, i in (("solo", solo, feature), ("joint", joint, partner))
    for factor, scale in (("removed", 0.0), ("doubled", 2.0))
}
decode = tokens.tokenizer.decode
steered = steering.next_tokens(subject_of(run), prompt, replacements, lambda i: decode([i]))
display(end, cases.steered_tokens(steered, feature, partner))

# %% [markdown]
# ## The feature explorer
#
# Every feature of every arm, with its contexts, the tokens that it promotes, its partner in the
# other dictionary (side by side, if you like) and the features it fires with: search, filter, and
# share the address of what you find. It opens on the strongest split, and is a page of its own in
# the book that needs no server.

# %%
pages = explorer.collect(run, every_arm, text, (solo, joint), told)
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

# %% tags=["hide-input"]
matches = measure.partners(cross, 1).round(4)
run.save_table("matches", matches, "Strongest φ partner of every feature, all pairs")
run.save_table("split_counts", split_counts, "Splits and merges in every pair of dictionaries")
run.save_table("split_choices", choices, "Splits and merges when one clause of the rule changes")
run.save_table("splitting", candidates, "Splitting candidates: solo features, joint partners, φ")
run.save_table("implied_overlap", implied, "Least φ between the paper's joint features of a word")
run.save_table("sense_information", info, "Sense information of the best feature, every arm")
run.save_table("steering", steered, "Next-token probabilities, a feature removed or doubled")
for study in studies:
    if study.table is not None:
        about = f"Table {study.number}: “{study.word}” in this model"
        run.save_table(f"table_{study.number}", study.table, about)

# %% tags=["hide-input"]
ours = cases.case_values(printed, studies)
run.save_table("case_study_values", ours, "φ of our joint partners, in the order of the paper's")
words = [study.sentence for study in studies]
sentences = [found.sentence(), *words, cases.sense_sentence(info)]
run.save_table("cluster", cluster_phi, "φ within the drawn cluster")
run.save_json("case_study_sentences", [s.replace("**", "") for s in sentences])
show.bullets("What a reader may conclude", sentences)

# %%
display(
    show.paper_against_ours(run, "*.case.*", label="tab-paper-05"),
    show.provenance(run),
    show.downloads(
        run, "matches", "split_counts", "split_choices", "splitting", "implied_overlap", "cluster",
        "sense_information", "steering", "case_study_values",
    ),
)  # fmt: skip
