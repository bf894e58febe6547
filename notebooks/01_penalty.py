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
# # The decomposability penalty
#
# The paper's whole method is one added term (§3.2). A small *meta SAE* tries to rebuild every
# decoder row $W_i$ of the dictionary under training from a few meta directions; its attempt is
# $\hat W_i$. A row that is easy to rebuild is penalised. The claim is that this pressure makes
# features "more mutually independent".
#
# This page takes the term apart before anything is trained. It derives the gradient, checks it
# against automatic differentiation, and draws what the gradient does to a row. Nothing here can
# confirm or refute the paper: it shows what the penalty *can* do, and what it cannot see.

# %% tags=["parameters"]
profile = "smollm2-135m"  # a file of profiles/, without .yml
overrides = {}  # changes by dotted key, such as {"training.sigma_sq": [0.5]}
runs_dir = "../runs"  # where results are kept, seen from this notebook's folder

# %% tags=["hide-input"]
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display

from metasae_lib import show
from metasae_lib.show import figures
from metasae_lib.train import decomposability, decomposability_penalty, penalty_pull

run = show.open_run(profile, overrides, runs_dir)

# %%
grid = run.profile.training
Markdown(
    f"This run: profile **{run.name}**, with λ₂ in {grid.lambda2} and σ² in {grid.sigma_sq}. "
    "The drawings below always show the paper's σ² of 0.3, 1 and 3."
)

# %% [markdown]
# ## Eq. 2 and Eq. 3, and their gradient
#
# ```{margin} The paper says
# The gradient "points each decoder column away from its current
# meta-reconstruction, into regions the meta dictionary has not yet learned" (§3.3).
# ```
#
# With $r_i = \lVert W_i - \hat W_i\rVert$ the distance between a row and its reconstruction,
#
# $$
# p_i = \exp\!\Big(-\frac{r_i^2}{\sigma^2}\Big), \qquad
# L = L_\text{SAE} + \lambda_2\,\frac1n\sum_{i=1}^{n} p_i .
# $$ (eq-penalty)
#
# The meta SAE is a frozen critic during a primary step (§3.3), so $\hat W_i$ is a constant, and the
# chain rule leaves one factor from the exponential and one from the square:
#
# $$
# \frac{\partial}{\partial W_i}\,\lambda_2\frac1n\sum_j p_j
#   = -\frac{2\lambda_2}{n\,\sigma^2}\; p_i\,\big(W_i - \hat W_i\big).
# $$ (eq-gradient)
#
# A descent step follows *minus* the gradient, so it moves $W_i$ straight away from $\hat W_i$. The
# next cell computes {eq}`eq-gradient` by hand in double precision and compares it with what PyTorch
# finds by differentiating {eq}`eq-penalty` itself.

# %%
generator = torch.Generator().manual_seed(0)
rows = torch.randn(200, 64, generator=generator, dtype=torch.float64)
rows = (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()
rebuilt = (rows + 0.1 * torch.randn(200, 64, generator=generator, dtype=torch.float64)).detach()

# %%
checks = []
for sigma_sq in (0.3, 1.0, 3.0):
    (auto,) = torch.autograd.grad(decomposability_penalty(rows, rebuilt, sigma_sq), rows)
    error = rows.detach() - rebuilt
    by_hand = penalty_pull(error.square().sum(1), 1.0, sigma_sq)[:, None] * error
    checks.append(((auto - by_hand).abs().max() / auto.abs().max()).item())
Markdown(
    f"Largest difference between the two, over the largest entry: **{max(checks):.1e}**. "
    + ("They are the same gradient." if max(checks) < 1e-12 else "They are **not** the same.")
)

# %% [markdown]
# ## How hard it pushes, and where
#
# The length of one row's gradient, without the common factor $\lambda_2/n$, is
#
# $$
# f(r) = \frac{2}{\sigma^2}\, r\, e^{-r^2/\sigma^2},
# \qquad f'(r) = 0 \iff r = \frac{\sigma}{\sqrt 2},
# \qquad f_{\max} = \frac{\sqrt{2/e}}{\sigma} .
# $$ (eq-push)
#
# So the push vanishes at both ends: a row that is rebuilt perfectly feels nothing (there is no
# direction to flee in), and a row far from its reconstruction feels nothing either. σ decides which
# rows are in reach.

# %% mystnb={"figure": {"name": "fig-penalty-profile", "caption": "The penalty (left) and the length of its gradient (right) along the distance between a row and its reconstruction, for the three bandwidths of the paper. Dots: the strongest push, at r = σ/√2. The push is zero at distance zero and fades beyond a few σ."}, "image": {"alt": "Two line charts over the distance r from 0 to 2. Left: the penalty falls from 1 like a bell, faster for small sigma squared. Right: the push rises from zero, peaks at sigma over root two, and falls."}}
r = torch.linspace(0, 2, 401, dtype=torch.float64)
curves = [
    pd.DataFrame({"r": r, "sigma_sq": s, "penalty": decomposability(r**2, s)}) for s in (0.3, 1, 3)
]
profile_table = pd.concat(curves, ignore_index=True)
profile_table["push"] = 2 / profile_table.sigma_sq * profile_table.r * profile_table.penalty
figures.penalty_profile(profile_table)

# %% [markdown]
# ## What unit rows leave of it
#
# Decoder rows have length one: after every step they are put back on the sphere, so only the part
# of the push along the sphere moves them. That bounds what the penalty can do. If the
# reconstruction is no longer than its row, $r^2 \le 4$, and $r^2 = 4$ only where the row points
# exactly *against* its reconstruction; a row at right angles to a unit reconstruction has
# $r^2 = 2$; and a row of which the meta SAE rebuilds nothing at all has $r^2 = 1$. The table puts
# these into Eq. 2.

# %%
bounds = pd.DataFrame({"σ²": [0.3, 1.0, 3.0]})
for name, squared in {"nothing is rebuilt": 1, "at a right angle": 2, "opposite": 4}.items():
    bounds[f"p where r² = {squared} ({name})"] = [np.exp(-squared / s) for s in bounds["σ²"]]
bounds["strongest push at r"] = np.sqrt(bounds["σ²"] / 2)
bounds["its length f"] = np.sqrt(2 / np.e / bounds["σ²"])
show.table(bounds, "What is left of the penalty at best, and where it pushes most", "tab-bounds")

# %% [markdown]
# Two consequences are worth keeping in mind when reading the results.
#
# - **With σ² = 3 the penalty never goes away.** Even a row of which nothing is rebuilt keeps most
#   of its $p_i$, and the only way to lower it further is to turn *against* the reconstruction. With
#   σ² = 0.3 the same row is left in peace.
# - **Eq. 2 sees one distance, not a subspace.** The least penalised row is $W_i = -\hat W_i/\lVert
#   \hat W_i\rVert$: it lies on the very line that the critic proposed. The meta SAE's activations
#   are positive, so it cannot rebuild that row with the same meta feature; but "lies outside the
#   span" and "is penalised little" are not the same thing. Whether training ever goes there is a
#   question for data.

# %% mystnb={"figure": {"name": "fig-push-2d", "caption": "The push in a plane around one reconstruction Ŵ (star), σ² = 1. Grey: minus the gradient of Eq. 2 anywhere in the plane, pointing straight away from Ŵ. Red: the part that moves a unit row along the circle. Rows near Ŵ are driven round it, and the one opposite is at rest."}, "image": {"alt": "A plane with the unit circle and a star at about 0.9 on the horizontal axis. The penalty is shaded round the star. Grey arrows point away from the star; red arrows on the circle run away from it along the circle, longest some forty degrees away from it."}}
side, what = 43, np.array([0.9, 0.0])
x, y = (g.ravel() for g in np.meshgrid(*[np.linspace(-1.35, 1.35, side)] * 2))
angle = np.linspace(0, 2 * np.pi, 24, endpoint=False) + np.pi / 24
field, on_circle = (
    pd.DataFrame({"x": a, "y": b, "penalty": np.exp(-((a - what[0]) ** 2) - (b - what[1]) ** 2)})
    for a, b in ((x, y), (np.cos(angle), np.sin(angle)))
)
for part in (field, on_circle):
    part["u"], part["v"] = 2 * part.penalty * (part.x - what[0]), 2 * part.penalty * (part.y - 0)
along = on_circle.v * on_circle.x - on_circle.u * on_circle.y
on_circle["u"], on_circle["v"] = -along * on_circle.y, along * on_circle.x
figures.push_2d(field.assign(what_x=what[0], what_y=what[1]), on_circle)

# %% [markdown]
# In three dimensions the picture becomes the paper's own: let the meta dictionary span a plane, so
# that $\hat W_i$ is the shadow of $W_i$ on it. Then the push points out of the plane, towards the
# poles: it does drive rows away from the shared subspace, as long as the critic rebuilds the whole
# of a row's shadow.

# %% mystnb={"figure": {"name": "fig-push-3d", "caption": "Unit rows (dots, darker = penalised more) when the meta dictionary spans the orange plane and rebuilds every row's shadow on it, σ² = 1. Red: the push along the sphere. It leads from the plane to the poles, and is weak both in the plane and near the poles."}, "image": {"alt": "A sphere of dots around an orange disc. Dots near the disc are dark, dots near the poles pale. Red arrows between them point from the disc towards the poles."}}
i = np.arange(160)
height, turn = 1 - (2 * i + 1) / 160, i * np.pi * (3 - 5**0.5)
flat = np.sqrt(1 - height**2)
points = np.stack([flat * np.cos(turn), flat * np.sin(turn), height], axis=1)
away = points * [0, 0, 1]  # row minus its shadow on the plane
p = np.exp(-(away**2).sum(1))
push = 2 * p[:, None] * away
push -= (push * points).sum(1, keepdims=True) * points
sphere = pd.DataFrame(np.hstack([points, 0.4 * push]), columns=list("xyzuvw")).assign(penalty=p)
figures.push_3d(sphere)

# %% [markdown]
# ## λ₂ and σ² explored
#
# λ₂ only multiplies the push; σ² changes *whom* it reaches. The next figure lets one unit row start
# ten degrees from a fixed unit reconstruction and follow the push alone, step by step, for every
# pair. In training two things work against this: the reconstruction error, which wants the row
# where the data are, and the meta SAE, which follows the row in its own phase (§3.3). The figure
# shows the pressure, not the outcome.
#
# ```{tip}
# **Change this yourself.** The next cell lists the values of λ₂ and σ² that are drawn: put any
# others there and run it; no training is involved.
# ```

# %% mystnb={"figure": {"name": "fig-escape", "caption": "The angle of a unit row to a fixed unit reconstruction while it follows the push alone, for the λ₂ and σ² of the paper (steps of 0.05). λ₂ sets the pace; σ² sets how far the push still reaches. Nothing but the data can hold the row back."}, "image": {"alt": "Three panels, one per lambda two. In each, the angle between row and reconstruction rises over gradient steps; it rises faster for larger lambda two, and a small sigma squared starts fast and stalls early."}}
trace = []
for lambda2, sigma_sq in [(a, b) for a in (0.1, 0.3, 1.0) for b in (0.3, 1.0, 3.0)]:
    theta = np.radians(10)
    for step in range(401):
        trace.append((step, np.degrees(theta), sigma_sq, lambda2))
        p_theta = np.exp(-(2 - 2 * np.cos(theta)) / sigma_sq)  # r² = 2 - 2 cos θ on the unit circle
        theta += 0.05 * lambda2 * 2 / sigma_sq * np.sin(theta) * p_theta
paths = pd.DataFrame(trace, columns=["step", "angle", "sigma_sq", "lambda2"])
figures.escape(paths)

# %% [markdown]
# ## What this means for training
#
# Eq. 3 averages over features: each of the $n$ rows feels $\lambda_2/n$ times the push, while the
# reconstruction error reaches a row only through the tokens on which its feature fires. The same λ₂
# therefore weighs differently on a rare and on a frequent feature, and on dictionaries of different
# size. Nothing in Eq. 2 mentions co-occurrence: that decoder rows which are hard to rebuild belong
# to features that fire independently is the paper's hypothesis, and
# `03_cooccurrence` is where it is tested.
#
# This page measures nothing of the paper; it only uses its settings.

# %% tags=["hide-input"]
gradient = pd.DataFrame({"sigma_sq": (0.3, 1.0, 3.0), "largest_relative_difference": checks})
about = "Eq. 2-3: gradient by hand against autograd, float64, 200 rows of 64 dimensions"
run.save_table("penalty_gradient", gradient, about)
run.save_table("penalty_profile", profile_table, "Eq. 2 and the length of its gradient over r")
run.save_table("penalty_bounds", bounds, "Eq. 2 at the distances that unit rows can reach")
run.save_table("push_2d", on_circle, "Push of Eq. 2 on unit rows in the plane, σ² 1, Ŵ = (0.9, 0)")
run.save_table("push_3d", sphere, "Push of Eq. 2 on unit rows over a plane, σ² 1, arrows × 0.4")
_ = run.save_table("penalty_escape", paths, "A unit row that follows the push from 10 degrees")

# %%
display(
    show.paper_against_ours(
        run, "*.setup.lambda2", "*.setup.sigma_sq", "*.setup.n_*_steps", label="tab-paper-01"
    ),
    show.provenance(run),
    show.downloads(
        run, "penalty_gradient", "penalty_profile", "penalty_bounds", "push_2d", "push_3d",
        "penalty_escape",
    ),
)  # fmt: skip
