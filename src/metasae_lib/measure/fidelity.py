"""How much of the residuals and of the language model's predictions a dictionary keeps.

The one definition of each in this project. With z the normalised residual (see `dictionary`) and
z_hat its reconstruction, over T tokens and d dimensions:

    L2  = Σ (z - z_hat)² / (T d)            the paper's L2 (App. D): the space has unit variance
    FVU = Σ (z - z_hat)² / Σ (z - z̄)²       z̄ the mean over tokens of each dimension

A dictionary that works in another space is measured in this one too, so that all compare: its error
there, token by token, times what a unit of its space is in z.

CE overhead: how much the model's cross-entropy rises when the residual is replaced by its
reconstruction, mapped back by the token's own mean and deviation. All on held-out text (role
`scan`), both with thresholds and in training mode (BatchTopK over the batch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from metasae_lib.measure.passes import by_arm, pre_activations, product_dtype, training_groups
from metasae_lib.measure.patterns import above
from metasae_lib.measure.scan import scan_inputs
from metasae_lib.measure.statistics import crossed_interval
from metasae_lib.measure.thresholds import calibrate_arms
from metasae_lib.study import Artefact, MeasureError, Role, Run, progress
from metasae_lib.study.sections import FIDELITY_TOKENS
from metasae_lib.subject import Residuals, Subject, load_tokens, subject_of
from metasae_lib.train import Arm, Dictionary, JumpReLU
from metasae_lib.train.dictionary import enter
from metasae_lib.train.kernels.compiled import batch_topk
from metasae_lib.train.kernels.plain import batch_topk as batch_topk_plain

VERSION = 3  # of the stage
Mode = Literal["threshold", "batch"]
MODES: tuple[Mode, ...] = ("threshold", "batch")


class Moments:
    """Sums of tokens and of their squares, (d,) float64."""

    def __init__(self, d: int) -> None:
        self.d, self.n_tokens = d, 0
        self._sum = torch.zeros(d, dtype=torch.float64)
        self._square = torch.zeros(d, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Add tokens (t, d)."""
        exact = z.double()
        self.n_tokens += len(z)
        self._sum += exact.sum(0).cpu()
        self._square += exact.square().sum(0).cpu()

    @property
    def variance(self) -> float:
        """Sum of squared deviations from the mean token, over tokens and dimensions."""
        return float((self._square - self._sum.square() / self.n_tokens).sum())


@dataclass
class Reconstruction:
    """Sums over tokens from which L2, FVU and L0 follow; float64.

    moments: of the same tokens, which several reconstructions may share.
    """

    moments: Moments
    errors: list[float] = field(default_factory=list)  # sum of squares, of each batch
    n_active: int = 0

    def add(self, u: Tensor, u_hat: Tensor, n_active: int, unit: Tensor | float = 1.0) -> None:
        """Add tokens. u, u_hat: (t, d) in the dictionary's space. n_active: activations that are
        not zero. unit: (t,) of `Entered.unit`, or 1 for normalised tokens."""
        self.n_active += n_active
        errors = (u - u_hat).square_().sum(1) * unit**2
        self.errors.append(float(errors.sum(dtype=torch.float64)))

    @property
    def l2(self) -> float:
        """Mean square error over tokens and dimensions."""
        return sum(self.errors) / (self.moments.n_tokens * self.moments.d)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained. Raises MeasureError if nothing varies."""
        variance = self.moments.variance
        if variance <= 0:
            raise MeasureError("the fraction of variance unexplained needs tokens that differ")
        return sum(self.errors) / variance

    @property
    def l0(self) -> float:
        """Mean number of active features a token."""
        return self.n_active / self.moments.n_tokens


def reconstruct(
    sae: Dictionary, z: Tensor, mode: Mode, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """z_hat (t, d) of z (t, d), as the dictionary reads it, and the number of active features.

    mode: "threshold", each feature above its own θ; or "batch", the k·t largest of the t tokens
    given, as in training. dtype: of the encoder product. Decoding is float32.
    """
    return _reconstruct(sae, pre_activations(sae, z, dtype), mode)[:2]


def _reconstruct(
    sae: Dictionary, pre: Tensor, mode: Mode, bracket: int = 0
) -> tuple[Tensor, int, int]:
    """z_hat, number of active features, and the bracket for the next batch (see `batch_topk`)."""
    if isinstance(sae, JumpReLU):
        mode = "threshold"  # the same in training and after
    if mode == "threshold" and sae.threshold is None:
        raise MeasureError("this dictionary has no thresholds: calibrate it first")
    if pre.device.type != "cpu":
        pre = pre.float()
        if mode == "batch":
            acts = batch_topk_plain(pre, sae.k * len(pre))[0].acts
        else:
            acts = torch.where(pre > sae.threshold, pre, 0)  # type: ignore[operator]
        return acts @ sae.W_dec + sae.b_dec, int((acts > 0).sum()), 0
    active, bracket = selected(sae, pre, mode, bracket)
    return decoded(sae, active), len(active.acts), bracket


class Active(NamedTuple):
    """What fires: feature `features[j]` with acts[j] on the token i whose range starts[i] to
    starts[i + 1] holds j."""

    starts: np.ndarray
    features: np.ndarray
    acts: np.ndarray


def selected(sae: Dictionary, pre: Tensor, mode: Mode, bracket: int = 0) -> tuple[Active, int]:
    """What fires in a mode, and the bracket for the next batch. pre: (t, n) on the CPU."""
    if mode == "batch":
        codes, bracket = batch_topk(pre, sae.k * len(pre), bracket)
        return Active(codes.row_ptr, codes.cols, codes.acts), bracket
    pattern, values = above(pre, sae.threshold)  # type: ignore[arg-type]
    return Active(pattern.indptr, pattern.indices, values), bracket


def decoded(sae: Dictionary, active: Active) -> Tensor:
    """z_hat (t, d) of what fires."""
    z_hat = F.embedding_bag(
        torch.from_numpy(active.features.astype(np.int64)),
        sae.W_dec,
        torch.from_numpy(active.starts[:-1]),
        mode="sum",
        per_sample_weights=torch.from_numpy(active.acts),
    )
    return z_hat.add_(sae.b_dec)


def measure_arms(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Fidelity of every arm on held-out text, one row an arm. Results are artefacts.

    Columns: arm, kind, seed, lambda2, sigma_sq;
    l2, fvu, l0_threshold and l2_batch, fvu_batch, l0_batch (at the thresholds; in training mode);
    ce, ce_baseline, ce_overhead_nats, ce_overhead_pct (of ce_baseline), ce_overhead_se (paired
    standard error over rows) and ce_batch, ce_overhead_batch_nats, ce_overhead_batch_pct;
    dead (features that BatchTopK never selected on the calibration tokens);
    n_tokens (of L2, FVU and L0), ce_rows, ce_tokens.

    CE is the mean over the predictions of the first `evaluation.ce_rows` rows; in training mode of
    the first `model.batch_rows` of them, which are one BatchTopK batch. The model's blocks up to
    the layer run once for all arms. Under
    `text.skip_first` the residual at position 0 stays as it is, and the prediction made there,
    which then cannot change, is left out.
    """
    described = ("kind", "seed", "lambda2", "sigma_sq", "k")
    rows = [
        {"arm": name}
        | {field: getattr(arms[name].spec, field) for field in described}
        | artefact.info["fidelity"]
        for name, artefact in _measured(run, arms).items()
    ]
    return pd.DataFrame(rows)


def fidelity_pairs(run: Run, arms: Mapping[str, Arm]) -> pd.DataFrame:
    """What each setting costs against the solo arm of its own seed, on the same text.

    Columns: setting (an arm without its seed), kind, n_seeds; d_l2_pct with l2_low and l2_high, and
    d_ce_nats with ce_low and ce_high. The intervals hold for other text, batch by batch of L2 and
    row by row of CE, and with two seeds for other seeds as well (`statistics.crossed_interval`).
    """
    by_text = {
        name: {measure: np.array(values) for measure, values in found.info["by_text"].items()}
        for name, found in _measured(run, arms).items()
    }
    rises: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, arm in arms.items():
        base, ours = by_text.get(f"solo-seed{arm.spec.seed}"), by_text[name]
        if arm.spec.kind != "solo" and base is not None:
            setting = name.removesuffix(f"-seed{arm.spec.seed}"), arm.spec.kind
            rise = 100 * (ours["l2"] - base["l2"]) / base["l2"].mean(), ours["ce"] - base["ce"]
            rises.setdefault(setting, []).append(rise)
    rows = []
    for setting, pairs in rises.items():
        l2, ce = (crossed_interval(each) for each in zip(*pairs, strict=True))
        rows.append((*setting, len(pairs), *l2, *ce))
    columns = ["setting", "kind", "n_seeds", "d_l2_pct", "l2_low", "l2_high"]
    return pd.DataFrame(rows, columns=[*columns, "d_ce_nats", "ce_low", "ce_high"])


def _measured(run: Run, arms: Mapping[str, Arm]) -> dict[str, Artefact]:
    calibrations = calibrate_arms(run, arms)
    residuals = Residuals(run, "scan")

    def make(missing: dict[str, Artefact]) -> None:
        model, chosen = subject_of(run), {name: arms[name] for name in missing}
        errors, entropies = _errors(run, residuals, chosen), _entropies(run, chosen, model)
        for name, artefact in missing.items():
            dead = int((calibrations[name].selected == 0).sum())
            (l2, by_batch), (ce, by_row) = errors[name], entropies[name]
            measured = {"fidelity": {**l2, **ce, "dead": dead}}
            by_text = {"by_text": {"l2": by_batch, "ce": by_row}}
            artefact.finish(measured | by_text)

    on = {**scan_inputs(run, residuals), "ce_rows": run.profile.evaluation.ce_rows}
    return run.made("fidelity", by_arm(arms, on), VERSION, make)


def norms(run: Run) -> pd.DataFrame:
    """‖x‖₂ of the raw residuals on held-out text (App. D), as a table of quantiles.

    Columns: quantile, norm (of the tokens that count under `text.skip_first`); and the same in
    every row: mean, std without position 0, mean_all, std_all with it, first (mean at position 0).
    """
    subject = subject_of(run)
    residuals = Residuals(run, "scan")
    chunks = range(residuals.n_chunks)[: math.ceil(FIDELITY_TOKENS / residuals.chunk_tokens(0))]
    kept = torch.cat([residuals.chunk(i).float().norm(dim=1) for i in chunks]).cpu().numpy()
    x, times = first_position(run, "scan", subject)
    first = x.float().norm(dim=1).cpu().numpy().astype(np.float64)
    rows = len(kept) / run.profile.text.kept_per_row
    share = times / times.sum() * rows  # rows of these chunks, by their first token
    sums = np.array(
        [len(kept), kept.sum(dtype=np.float64), np.square(kept, dtype=np.float64).sum()]
    )
    at_first = np.array([rows, (share * first).sum(), (share * first**2).sum()])
    without = sums if run.profile.text.skip_first else sums - at_first
    quantiles = np.concatenate([[0.001, 0.01], np.linspace(0.05, 0.95, 19), [0.99, 0.999]])
    table = pd.DataFrame({"quantile": quantiles, "norm": np.quantile(kept, quantiles)})
    table[["mean", "std"]] = _moments(without)
    table[["mean_all", "std_all"]] = _moments(without + at_first)
    return table.assign(first=at_first[1] / rows)


def first_position(run: Run, role: Role, subject: Subject) -> tuple[Tensor, np.ndarray]:
    """Residuals (u, d) of position 0 for each distinct first token of a role, and their rows (u,).

    Attention is causal, so that nothing but the first token matters there.
    """
    first, times = np.unique(load_tokens(run).rows(role)[:, 0], return_counts=True)
    parts = [subject.residuals(ids)[:, 0] for ids in torch.from_numpy(first)[:, None].split(512)]
    return torch.cat(parts), times


def _moments(sums: np.ndarray) -> tuple[float, float]:
    n, total, square = (float(value) for value in sums)
    mean = total / n
    return mean, math.sqrt(max(square / n - mean**2, 0.0))


_ByText = dict[str, tuple[dict[str, float], list[float]]]  # of an arm: in all, and by part of text


def _errors(run: Run, residuals: Residuals, arms: Mapping[str, Arm]) -> _ByText:
    dtype, moments = product_dtype(run), Moments(residuals.d)
    sums = {(name, mode): Reconstruction(moments) for name in arms for mode in MODES}
    brackets, tokens = dict.fromkeys(sums, 0), list[int]()
    what, n_tokens = f"fidelity of {len(arms)} arms", min(FIDELITY_TOKENS, residuals.n_tokens)
    for group, sizes in training_groups(run, residuals, n_tokens, what):
        moments.add(group.z)
        tokens += sizes
        for name, arm in arms.items():
            u, unit = group.of(arm.sae), group.unit(arm.sae)
            pre = pre_activations(arm.sae, u, dtype)
            batches = zip(u.split(sizes), unit.split(sizes), pre.split(sizes), strict=True)
            for part, units, batch in batches:
                for mode in MODES:
                    at = name, mode
                    u_hat, active, brackets[at] = _reconstruct(arm.sae, batch, mode, brackets[at])
                    sums[at].add(part, u_hat, active, units)
    result: _ByText = {}
    for name in arms:
        held, batch = (sums[name, mode] for mode in MODES)
        by_batch = (np.array(held.errors) / (np.array(tokens) * moments.d)).tolist()
        in_all = {
            "l2": held.l2, "fvu": held.fvu, "l0_threshold": held.l0,
            "l2_batch": batch.l2, "fvu_batch": batch.fvu, "l0_batch": batch.l0,
            "n_tokens": moments.n_tokens,
        }  # fmt: skip
        result[name] = in_all, by_batch
    return result


def _entropies(run: Run, arms: Mapping[str, Arm], subject: Subject) -> _ByText:
    rows = np.asarray(load_tokens(run).rows("scan")[: run.profile.evaluation.ce_rows])
    first, dtype = int(run.profile.text.skip_first), product_dtype(run)
    size = run.profile.model.batch_rows
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    reached = [subject.residuals(ids) for ids in batches]

    def row_means(replacement: Any, n_batches: int) -> np.ndarray:
        parts = [
            subject.loss(ids, replacement, x)[:, first:]
            for ids, x in zip(batches[:n_batches], reached, strict=False)
        ]
        return torch.cat(parts).double().mean(dim=1).cpu().numpy()

    baseline = row_means(lambda x: x, len(batches))
    ce, result = float(baseline.mean()), _ByText()
    with progress(len(arms), f"cross-entropy of {len(arms)} arms") as bar:
        for name, arm in arms.items():
            held = row_means(replacement(arm.sae, "threshold", first, dtype), len(batches))
            batch = row_means(replacement(arm.sae, "batch", first, dtype), 1)
            rise, same_rows = held - baseline, baseline[: len(batch)]
            rise_batch = batch - same_rows
            error = float(rise.std(ddof=1)) / math.sqrt(len(rise)) if len(rise) > 1 else math.nan
            in_all = {
                "ce": float(held.mean()),
                "ce_baseline": ce,
                "ce_overhead_nats": float(rise.mean()),
                "ce_overhead_pct": 100 * float(rise.mean()) / ce,
                "ce_overhead_se": error,
                "ce_batch": float(batch.mean()),
                "ce_overhead_batch_nats": float(rise_batch.mean()),
                "ce_overhead_batch_pct": 100 * float(rise_batch.mean() / same_rows.mean()),
                "ce_rows": len(rows),
                "ce_tokens": len(rows) * (rows.shape[1] - 1 - first),
            }
            result[name] = in_all, rise.tolist()
            bar.update()
    return result


def replacement(
    sae: Dictionary, mode: Mode, first: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """For `Subject.loss`: residuals (r, c, d) -> their reconstructions, positions before `first`
    as they are. In mode "batch" the k·t largest of all t tokens given are kept."""

    def replace(x: Tensor) -> Tensor:
        kept = x[:, first:].float()
        u, shift, scale = enter(kept.flatten(0, 1), sae.space)
        u_hat, _ = reconstruct(sae, u, mode, dtype)
        out = x.clone()
        out[:, first:] = (u_hat * scale + shift).view_as(kept).to(x.dtype)
        return out

    return replace
