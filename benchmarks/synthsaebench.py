"""SynthSAEBench beside SAELens' own: the same world, the same statistics, the same scores, faster.

    make bench BENCH=synthsaebench      (SAELens in an environment of its own, `make peers`)

SAELens makes a small world of the same form with all 100 steps of orthogonalisation, whose atoms
must be ours, and samples the benchmark's own world: with 16,384 atoms, but for the steps, which
take it 20 minutes. Its samples and ours are compared as two draws: if they are of one distribution,
differences over their standard errors scatter by 1. Scores are compared on the same inputs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_array

from metasae_lib.measure import synthsaebench
from metasae_lib.measure.fidelity import Active, Moments, Reconstruction
from metasae_lib.study.known import WORLDS
from metasae_lib.subject.world import Samples, World, make_world

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, BATCH = 20_480, 1024
PAIRED = 256  # atoms, the most frequent, whose pairs are counted
SPEC = replace(WORLDS["synthsaebench-16k"], steps=0)
SMALL = replace(SPEC, n_atoms=1500, d=96, roots=16, steps=100)
IN_PEER = """
import json, sys, time, torch
from safetensors.torch import load_file, save_file
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import *
from sae_lens.synthetic.evals import *
folder, (small, full), n, batch = sys.argv[1], *json.loads(sys.argv[2])

def model(s):
    steps = OrthogonalizationConfig(num_steps=s["steps"], lr=s["learning_rate"])
    return SyntheticModel(SyntheticModelConfig(
        num_features=s["n_atoms"], hidden_dim=s["d"],
        firing_probability=ZipfianFiringProbabilityConfig(
            exponent=s["exponent"], max_prob=s["rates"][0], min_prob=s["rates"][1]),
        hierarchy=HierarchyConfig(
            total_root_nodes=s["roots"], branching_factor=s["branching"], max_depth=s["depth"],
            mutually_exclusive_portion=1.0, compensate_probabilities=True,
            scale_children_by_parent=True),
        orthogonalization=steps if s["steps"] else None,
        correlation=LowRankCorrelationConfig(rank=s["rank"], correlation_scale=s["correlation"]),
        mean_firing_magnitudes=LinearMagnitudeConfig(*s["strengths"]),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(*s["spread"]),
        bias=s["bias"], seed=s["seed"]))

out = {}
for name, spec in (("small", small), ("full", full)):
    made = model(spec)
    own = made.activation_generator
    out[name + ".atoms"] = made.feature_dict.feature_vectors.detach()
    out[name + ".bias"] = made.feature_dict.bias.detach()
    out[name + ".probabilities"] = own.firing_probabilities
    out[name + ".factors"] = made.correlation_matrix.correlation_factor
    out[name + ".means"], out[name + ".spreads"] = (
        own.mean_firing_magnitudes, own.std_firing_magnitudes)
torch.manual_seed(7)
parts, norms, started = [], [], time.perf_counter()
with torch.no_grad():
    for i in range(n // batch):
        acts = own.sample(batch)
        x = made.feature_dict(acts)
        rows, atoms = acts.nonzero(as_tuple=True)
        parts.append((rows + i * batch, atoms, acts[rows, atoms]))
        norms.append(x.norm(dim=1))
seconds = time.perf_counter() - started
out["rows"], out["fired"], out["strengths"] = map(torch.cat, zip(*parts))
out["norms"] = torch.cat(norms)
given = load_file(folder + "/inputs.safetensors")
rows, atoms = given["rows"], given["atoms"]
scores = compute_classification_metrics(given["acts"], given["strengths"], rows, atoms)
variance = ExplainedVarianceCalculator()
variance.add_batch(given["x_hat"], given["x"])
save_file({name: value.contiguous() for name, value in out.items()}, folder + "/peer.safetensors")
print(json.dumps({
    "seconds": seconds, "f1": scores.f1_score, "mcc": mean_correlation_coefficient(rows, atoms),
    "uniqueness": feature_uniqueness(rows, atoms), "variance_explained": variance.compute()}))
"""


def scored(world: World) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Inputs for the scores, features that half know their atoms, and our scores of them."""
    generator = torch.Generator().manual_seed(3)
    given = world.sample(BATCH, [3])
    strengths = torch.from_numpy(csr([given]).toarray())
    rows = world.atoms[torch.randint(2000, (300,), generator=generator)]
    rows = rows + 0.04 * torch.randn(rows.shape, generator=generator)
    cosines = synthsaebench.abs_cosines(rows, world.atoms)
    matches = cosines.argmax(1)
    flipped = torch.rand(BATCH, 300, generator=generator) < 0.02
    acts = ((strengths[:, matches] > 0) ^ flipped).float().to_sparse_csr()
    found = Active(*(part.numpy() for part in (
        acts.crow_indices(), acts.col_indices(), acts.values())))  # fmt: skip
    x_hat = given.x + torch.randn(given.x.shape, generator=generator)
    detection = synthsaebench.Detection(matches.numpy(), world.spec.n_atoms)
    detection.add(found, given)
    sums = Reconstruction(Moments(world.spec.d))
    sums.moments.add(given.x)
    sums.add(given.x, x_hat, 0)
    ours = {
        "f1": detection.f1(),
        "mcc": synthsaebench.mcc(cosines),
        "uniqueness": synthsaebench.uniqueness(matches.numpy()),
        "variance_explained": 1 - sums.fvu,
    }
    return {
        "rows": rows, "atoms": world.atoms, "acts": acts.to_dense(), "strengths": strengths,
        "x": given.x, "x_hat": x_hat,
    }, ours  # fmt: skip


def csr(found: list[Samples]) -> csr_array:
    """Strengths (samples, atoms) of batches."""
    counts = np.concatenate([np.diff(one.starts) for one in found])
    atoms, strengths = (np.concatenate(parts) for parts in zip(
        *((one.atoms, one.strengths) for one in found), strict=True))  # fmt: skip
    return csr_array(
        (strengths, atoms, np.concatenate([[0], np.cumsum(counts)])),
        shape=(len(counts), SPEC.n_atoms),
    )


def compared(a: csr_array, b: csr_array, x_a: np.ndarray, x_b: np.ndarray) -> dict[str, float]:
    """Differences of two draws over their standard errors: their root mean square over atoms and
    pairs, and those of single figures. x: (samples,) norms of the samples."""
    moments, found = {}, {}
    for name, draw in (("a", a), ("b", b)):
        fires = draw.copy()
        fires.data = np.ones_like(fires.data, np.float64)
        draw = draw.astype(np.float64)
        n = np.maximum(fires.sum(0), 1)
        mean, square = draw.sum(0) / n, draw.multiply(draw).sum(0) / n
        first = fires[:, :PAIRED].toarray()
        l0 = fires.sum(1)
        moments[name] = n, mean, square - mean**2, np.triu(first.T @ first, 1), l0
    (n_a, mean_a, var_a, pair_a, l0_a), (n_b, mean_b, var_b, pair_b, l0_b) = moments.values()
    for what, count_a, count_b in (
        ("rates over atoms", n_a, n_b),
        ("pairs over pairs", pair_a, pair_b),
    ):
        enough = count_a + count_b >= 40
        p = (count_a + count_b)[enough] / (2 * SAMPLES)
        z = (count_a - count_b)[enough] / np.sqrt(2 * SAMPLES * p * (1 - p))
        found[what] = float(np.sqrt((z**2).mean()))
    enough = np.minimum(n_a, n_b) >= 40
    z = (mean_a - mean_b)[enough] / np.sqrt(var_a / n_a + var_b / n_b)[enough]
    found["mean strengths over atoms"] = float(np.sqrt((z**2).mean()))
    for what, left, right in (("L0", l0_a, l0_b), ("norm", x_a, x_b)):
        for power in (1, 2):
            u, v = (
                (side - np.mean([left.mean(), right.mean()])) ** power for side in (left, right)
            )
            error = np.sqrt(u.var() / len(u) + v.var() / len(v))
            found[f"{what}, moment {power}"] = float(abs(u.mean() - v.mean()) / error)
        print(f"{what}: ours {left.mean():.3f} ± {left.std():.3f}, SAELens {right.mean():.3f} ± "
              f"{right.std():.3f}")  # fmt: skip
    return found


def main() -> None:
    peers = os.environ.get("METASAE_PEERS", str(ROOT / ".venv-peers" / "bin" / "python"))
    if not Path(peers).exists():
        sys.exit("The peers' environment is missing: make peers")
    small, full = make_world(SMALL), make_world(SPEC)
    inputs, ours = scored(full)
    full.sample(8, [0])  # compiles
    started = time.perf_counter()
    found = [full.sample(BATCH, [7, i]) for i in range(SAMPLES // BATCH)]
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        save_file(inputs, Path(folder) / "inputs.safetensors")
        asked = json.dumps([[asdict(SMALL), asdict(SPEC)], SAMPLES, BATCH])
        done = subprocess.run(
            [peers, "-c", IN_PEER, folder, asked], check=True, capture_output=True, text=True
        )
        theirs = load_file(Path(folder) / "peer.safetensors")
    said = json.loads(done.stdout.splitlines()[-1])
    agree = []
    for score, value in ours.items():
        print(f"{score}: ours {value:.7f}, SAELens {said[score]:.7f}")
        agree.append(abs(value - said[score]) < 1e-5 * abs(value))
    for name, world in (("small", small), ("full", full)):
        for part in ("atoms", "bias", "probabilities", "factors", "means", "spreads"):
            gap = (getattr(world, part) - theirs[f"{name}.{part}"]).abs().max().item()
            print(f"{name} world, {part}: largest difference {gap:.1e}")
            agree.append(gap < 1e-4)
    starts = torch.bincount(theirs["rows"], minlength=SAMPLES).cumsum(0).numpy()
    peer = csr_array(
        (theirs["strengths"].numpy(), theirs["fired"].numpy(), np.concatenate([[0], starts])),
        shape=(SAMPLES, SPEC.n_atoms),
    )
    norms = torch.cat([one.x.norm(dim=1) for one in found]).numpy()
    scatter = compared(csr(found), peer, norms, theirs["norms"].numpy())
    for what, value in scatter.items():
        print(f"samples, {what}: differences over their standard errors scatter by {value:.2f}")
        agree.append(value < 1.1 if "over" in what else value < 4)
    print(f"SAELens: {SAMPLES / said['seconds']:,.0f} samples/s; ours: {SAMPLES / seconds:,.0f}")
    if not all(agree):
        sys.exit("SAELens' benchmark and ours disagree")
    print(f"ratio: {said['seconds'] / seconds:.2f}")


if __name__ == "__main__":
    main()
