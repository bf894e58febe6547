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
# # Training every arm from one stream
#
# The paper trains a solo dictionary and nine joint ones, "identically configured" (§4), and reads
# every result as joint against solo. So the comparison is worth as much as the word *identically*.
# Here every **arm** (one dictionary under one condition) takes the same batches of residuals in the
# same order, and starts from the same weights where seeds are equal: arms differ in nothing but
# their condition.
#
# The paper's claims about this stage: reconstruction gets worse by a modest amount (L2 +9.3%, CE
# overhead 3.1% instead of 2.5%, §5.3), no feature dies of it (§7.1), and a joint arm without the
# penalty is no different from a solo one (§5.1). What this page can say depends on the run it
# shows; the default models are much smaller than GPT-2 large, so changes *between* arms may
# transfer and absolute losses do not.

# %% tags=["parameters"]
profile = "smollm2-135m"  # a file of profiles/, without .yml
overrides = {}  # changes by dotted key, such as {"training.lambda2": [0.3, 0.5]}
runs_dir = "../runs"  # where results are kept, seen from this notebook's folder

# %% [markdown]
# :::{admonition} Change this yourself
# :class: tip
# Set `overrides = {"training.lambda2": [0.3, 0.5]}` above and run all cells. The arms that exist
# already are taken from disk, only the new one is trained, and its results go to a run of their
# own: what you see here stays as it is.
# :::

# %% [markdown]
# ## What the residual is made of
#
# Many models have *massive activations*: a few dimensions that are large, and much the same, on every
# token. A dictionary that starts at zero spends its features on them, and most of the others die.
# L2 flatters it, since a constant is easily rebuilt; FVU, the share of the variance *around the mean*,
# does not. `training.start` can take the mean out of what training sees.

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown, display

from metasae_lib import measure, show
from metasae_lib.show import figures
from metasae_lib.train import meta_posthoc, train_arms

run = show.open_run(profile, overrides, runs_dir)
shares, by_position = measure.residual_makeup(run)
Markdown(show.makeup_sentence(run, shares))

# %% mystnb={"figure": {"name": "fig-makeup", "caption": "Left: the largest dimensions of the normalised residual z, and all others together: their share of its mean square, of its variance around the mean, and of what training sees. Right: the mean norm of the raw residual along a row of text."}, "image": {"alt": "Left, bars in groups of three for the ten largest dimensions and the rest; right, a line of the mean residual norm against the position in the row."}}
figures.makeup(shares, by_position)

# %% [markdown]
# ## Training

# %%
arms = train_arms(run)
about = pd.DataFrame([{"arm": name} | vars(arm.spec) for name, arm in arms.items()])
sizes, training = run.profile.dictionary, run.profile.training
Markdown(
    f"**{len(arms)} arms** with {sizes.n_features:,} features, k = {sizes.k}, trained on "
    f"{training.train_tokens:,} tokens each ({run.profile.steps:,} steps of "
    f"{training.batch_tokens:,}). {show.scale_of_run(run)}"
)

# %% [markdown]
# ## The arms
#
# *solo* is a plain BatchTopK dictionary; *joint* adds the meta SAE and the penalty of Eq. 3;
# *control* adds the meta SAE with λ₂ = 0; *frontier* is solo at a smaller k. With λ₂ = 0 the
# penalty's gradient is exactly zero whatever its σ², so there is one control, and it must equal the
# solo arm of its seed *bit for bit*. The paper reports "no systematic effect" (§5.1), which is
# weaker. This is a free test of the whole training code: any leak from the meta SAE into the primary
# one would show. The last row of each arm's training record, and the control's weights:

# %%
history = pd.concat([arm.history.assign(arm=name) for name, arm in arms.items()])
history, control = history.merge(about, on="arm"), show.controls(arms)
display(
    show.last_steps(history),
    show.table(control, "The control against its solo arm: all weights", "tab-control"),
    Markdown(show.flattening_sentence(history)),
)

# %% [markdown]
# ## Losses and dead features
#
# A feature is *dead* when BatchTopK has not selected it for a while (here: for
# `training.dead_after` batches in a row). It costs capacity, and it flatters mean |φ|: a feature
# that hardly fires can hardly co-fire. The auxiliary loss AuxK lets the dead features rebuild what
# the living ones missed, which brings most of them back.

# %% mystnb={"figure": {"name": "fig-training-l2", "caption": "Left: reconstruction error L2 of each training batch, every arm; a mean square in a space where every token has unit variance, so the share of variance that the dictionary misses. Dashes: the control, which should lie on its solo arm. Right: features that have not fired for some batches. What counts is that the arms end alike, since a difference in living features would move mean |φ| by itself."}, "image": {"alt": "Two line charts against millions of training tokens, one line per arm, coloured by kind: L2, which falls steeply at first and then flattens, and the number of dead features."}}
figures.losses(history)

# %% [markdown]
# ## The penalty at work
#
# The meta SAE of a control is trained exactly like a joint arm's, but nobody listens to it. So its
# mean penalty is what a dictionary that feels no pressure would pay, and the gap between the two
# curves is what the pressure achieved *by its own yardstick*. That is not yet evidence of atomic
# features: it is what was optimised.

# %% mystnb={"figure": {"name": "fig-training-penalty", "caption": "Mean penalty (Eq. 2) that each arm's own meta SAE assigns to its decoder rows. The gap between joint and control at the same σ² is what λ₂ bought in the quantity that it optimises."}, "image": {"alt": "Line chart of the mean penalty against millions of training tokens for joint and control arms."}}
felt = history[history.sigma_sq.notna() & history.penalty.notna()]  # not OrtSAE's, another quantity
figures.training_curve(felt, "penalty", "mean penalty p (0 to 1)")

# %% [markdown]
# ## What it costs
#
# L2 and FVU on held-out text, and the cross-entropy of the language model when the residual at this
# layer is replaced by its reconstruction. Features fire above fixed thresholds here (Appendix A),
# not by a batch's top-k, and position 0 keeps its true residual.

# %%
measure.calibrate_arms(run, arms)
fidelity = measure.measure_arms(run, arms)
display(show.fidelity_sentences(run, fidelity), show.both_modes(run, fidelity))

# %% [markdown]
# Arms of one seed are measured on the same text, so their *difference* is known far better than
# either value. The intervals hold for other text (batches of L2, rows of CE) and, where a setting has
# several seeds, for other seeds too.

# %% mystnb={"figure": {"name": "fig-fidelity-pairs", "caption": "Change of L2 (left) and of cross-entropy (right) of each setting against the solo arm of its own seed, on the same held-out text, with 95% intervals for other text and, where there are several, other seeds."}, "image": {"alt": "Two dot plots with one row per setting: change of L2 in percent on the left, of cross-entropy in nats on the right, each with a horizontal interval and a line at zero."}}
costs = measure.fidelity_pairs(run, arms)
figures.fidelity_pairs(costs)

# %% [markdown]
# ## Are they still the same features?
#
# Solo and joint arms of a seed start from the same rows. If training keeps them near, feature i of
# one can be held against feature i of the other, which the next page does. Between *seeds* there is
# nothing to keep: what they share is found by looking for each row's nearest (PW-MCC), and rows in
# random directions have about √(2 ln n / d).

# %% mystnb={"figure": {"name": "fig-same", "caption": "Mean cosine of decoder rows: feature i with feature i of another dictionary, and each feature with the nearest of all (PW-MCC). Whiskers: the least and the largest over pairs of dictionaries. Random directions are the starts of two seeds."}, "image": {"alt": "Dots in rows: cosines of solo and joint arms with their starts and with each other, of two seeds, and of random directions."}}
same = measure.same_features(run, arms)
figures.same_features(same)

# %% [markdown]
# ## BatchTopK against JumpReLU
#
# The paper chose BatchTopK after "an empirical ablation comparing both architectures across 8
# configurations" (§4), in which it had the lower L2 with and without the penalty. It does not say
# which eight. Ours are both architectures, solo and joint, at k and at half of it. A JumpReLU
# feature fires above a threshold of its own, which is learned; a term (L0/k − 1)² of the loss holds
# the mean number of active features near k.

# %% mystnb={"figure": {"name": "fig-ablation", "caption": "Held-out L2 against L0 of BatchTopK and JumpReLU dictionaries, solo (filled) and joint (open). Compare at equal L0: further down is better."}, "image": {"alt": "L2 against L0: blue squares BatchTopK, orange triangles JumpReLU, solid lines solo, dashed lines joint."}}
ablation = show.ablation(run, fidelity)
figures.ablation(ablation)

# %%
Markdown(show.ablation_sentence(ablation))

# %% [markdown]
# ## Other ways to train
#
# - *frontier*: solo dictionaries of smaller k, as bad at reconstruction as the joint arms. If worse
#   reconstruction alone lowers mean |φ|, they will show it ([](03_cooccurrence.ipynb)).
# - *ortsae*: the competing penalty of {cite:t}`korznikov2025ortsae`, on the largest cosine of each
#   decoder row to the others of its chunk.
# - *matryoshka*: the nested dictionaries of {cite:t}`bussmann2025matryoshka`: the first few
#   features must rebuild the residual alone, and so must each of several longer beginnings.
# - *as-released*: the training choices of the authors' code (rows made unit before the step, AuxK's
#   residual not a constant, meta k half as large, 100 primary to 10 meta steps), solo and joint.
# - *critic*: the joint arm with one of the last two choices at a time.

# %%
show.competitors(run, fidelity)

# %% [markdown]
# ## A critic that the arm never saw
#
# A joint arm was trained against its own meta SAE. Whether its decoder is *harder to decompose* must
# be asked of another one: a meta SAE trained on the frozen decoder afterwards, as
# {cite:t}`bussmann2024meta` do. The less of the decoder's variance it explains, the less the
# rows share. *saebench* has the settings of that benchmark: a quarter of the features, k 4.

# %%
chosen = {
    name: arm for name, arm in arms.items() if arm.spec.kind == "solo"
    or (arm.spec.kind == "joint" and (arm.spec.lambda2, arm.spec.sigma_sq) == run.profile.selected)
}  # fmt: skip
posthoc = meta_posthoc(run, chosen)
show.explained(run, posthoc)

# %% [markdown]
# ## Where the time went

# %% mystnb={"figure": {"name": "fig-time", "caption": "Time that the stages of this run took when they were made. Artefacts are kept: running this notebook again takes none of it."}, "image": {"alt": "Horizontal bars: seconds for each stage of the run."}}
time = show.time_spent(run)
figures.time_spent(time)

# %% tags=["hide-input"]
run.save_table("training", history, "Losses of every arm during training, every ten steps")
run.save_table("makeup", shares, "What the normalised residual is made of, by dimension")
run.save_table("norms_by_position", by_position, "Mean norm of the residual by position")
run.save_table("arms", fidelity, "Fidelity of every arm on held-out text, at its thresholds")
run.save_table("fidelity_pairs", costs, "Settings against their solo partners, same text")
run.save_table("same_features", same, "Cosines of decoder rows between dictionaries")
run.save_table("control", control, "Weights of every control against the solo arm of its seed")
run.save_table("ablation", ablation, "BatchTopK against JumpReLU, solo and joint")
run.save_table("meta_posthoc", posthoc, "Decoder variance explained by a meta SAE afterwards")
_ = run.save_table("time", time, "Seconds that each stage of the run took when it was made")

# %%
display(
    show.paper_against_ours(
        run, "*.solo_l2", "*ce_nats", "*.solo_ce_*", "*.joint_ce_*", "*.joint_*_ce_*",
        "*.l2_increase_absolute", "*.dead_*", "*.d_l2_pct*", label="tab-paper-02",
    ),
    show.provenance(run),
    show.downloads(
        run, "arms", "makeup", "norms_by_position", "fidelity_pairs", "same_features", "training", "control", "ablation",
        "meta_posthoc", "time",
    ),
)  # fmt: skip
