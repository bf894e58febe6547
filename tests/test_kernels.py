"""Each compiled loop against its plain form, and the selection against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lib.train.dictionary import EPS, normalise
from metasae_lib.train.kernels import compiled, plain
from metasae_lib.train.kernels.common import Adam, Batch, Codes, Extra, Pull, Rows, adam_step


def dense(codes: Codes, shape: tuple[int, int]) -> Tensor:
    """The listed activations as a matrix, written one by one."""
    acts = torch.zeros(shape)
    for t in range(shape[0]):
        for p in range(codes.row_ptr[t], codes.row_ptr[t + 1]):
            acts[t, codes.cols[p]] = float(codes.acts[p])
    return acts


def by_sorting(pre: Tensor, k: int) -> Tensor:
    """Top k of the flat matrix by a full sort on (-value, index), then relu."""
    flat = pre.flatten().tolist()
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]
    out = torch.zeros(len(flat))
    for i in best:
        out[i] = max(flat[i], 0.0)
    return out.view_as(pre)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 9),
    n=st.integers(1, 17),
    k=st.integers(1, 160),
    levels=st.sampled_from([1, 2, 5, 1000]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    bracket=st.sampled_from([0, 1, 16000, 16256, 32000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_batch_topk_is_exact_whatever_the_bracket(
    b: int, n: int, k: int, levels: int, shift: float, bracket: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels + 1, (b, n), generator=generator) / levels + shift
    pre = pre.to(dtype)
    k = min(k, b * n)
    if dtype == torch.float32:
        bracket <<= 16
    codes, following = compiled.batch_topk(pre, k, bracket)
    expected = by_sorting(pre, k)
    torch.testing.assert_close(dense(codes, (b, n)), expected, rtol=0, atol=0)
    torch.testing.assert_close(plain.batch_topk(pre, k)[0].acts.float(), expected, rtol=0, atol=0)
    again, _ = compiled.batch_topk(pre, k, following)
    torch.testing.assert_close(dense(again, (b, n)), expected, rtol=0, atol=0)


def test_lists_by_token_and_by_feature_agree() -> None:
    pre = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    codes, _ = compiled.batch_topk(pre, 333)
    assert codes.row_ptr[-1] == codes.col_ptr[-1] == 333
    acts = dense(codes, (40, 60))
    for j in range(60):
        mine = slice(codes.col_ptr[j], codes.col_ptr[j + 1])
        tokens = acts[:, j].nonzero()[:, 0]
        assert codes.rows[mine].tolist() == tokens.tolist()
        assert codes.acts[codes.entries[mine]].tolist() == acts[tokens, j].tolist()
    assert torch.equal(compiled.fired(codes), (acts > 0).any(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 7, 30])
def test_row_topk(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    pre = torch.randint(-9, 9, (33, 50), generator=generator).to(dtype)
    features = torch.tensor([0, 3, 4, 8, 17, 21, 22, 30, 31, 40, 41, 42, 49])
    expected = torch.stack([by_sorting(row[None], min(k, 13))[0] for row in pre[:, features]])
    for form in (compiled, plain):
        out = form.row_topk(pre, features, k)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0)
        padded = form.row_topk(pre, torch.cat([features, torch.tensor([-1, -1])]), k)
        assert torch.equal(padded[:, :13], out) and not padded[:, 13:].any()


def problem(b: int, d: int, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = draw(n, d)
    return {
        "pre": draw(b, n),
        "z": draw(b, d),
        "b_dec": draw(d) / 4,
        "W_enc_T": draw(n, d) / 8,
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
    }


@pytest.mark.parametrize(
    ("b", "d", "n", "ends"), [(1, 2, 1, [1]), (70, 33, 45, [45]), (64, 32, 96, [1, 2, 33, 96])]
)
def test_residual(b: int, d: int, n: int, ends: list[int]) -> None:
    p, at = problem(b, d, n), np.array(ends)
    k = b * n // 5 + 1
    codes, _ = compiled.batch_topk(p["pre"], k)
    matrix, _ = plain.batch_topk(p["pre"], k)
    error, square, dots = compiled.residual(codes, p["z"], p["W_dec"], p["b_dec"], at, True)
    error_, square_, dots_ = plain.residual(matrix, p["z"], p["W_dec"], p["b_dec"], at, True)
    left = [p["z"] - p["b_dec"] - matrix.acts[:, :e] @ p["W_dec"][:e] for e in ends]
    for g in range(len(ends)):
        torch.testing.assert_close(error[g], sum(left[g:], torch.zeros(b, d)), rtol=0, atol=1e-4)
    torch.testing.assert_close(square, left[-1].square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error, error_, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(square, square_, rtol=1e-5, atol=1e-5)
    listed = dense(codes._replace(acts=dots), (b, n))
    torch.testing.assert_close(listed, dots_, rtol=1e-4, atol=1e-5)
    again, _, none = compiled.residual(codes, p["z"], p["W_dec"], p["b_dec"], at, False)
    assert torch.equal(again, error) and len(none) == 0


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("with_pull", [False, True])
@pytest.mark.parametrize("ends", [[75], [2, 40, 41, 75]])
def test_update_rows(with_extra: bool, with_pull: bool, ends: list[int]) -> None:
    b, d, n = 70, 33, 75
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    m = 3 if with_extra else 0
    extra = Extra(torch.tensor([0, 5, 74])[:m], draw(m, d), draw(m, d), draw(m))
    pull = Pull(draw(n, d), draw(n)) if with_pull else None
    start = [draw(n, d).square() / 9 for _ in range(4)]
    results = []
    for form in (compiled, plain):
        p = problem(b, d, n)
        codes, _ = form.batch_topk(p["pre"], 400)
        at = np.array(ends)
        error, _, dots = form.residual(codes, p["z"], p["W_dec"], p["b_dec"], at, True)
        rows = Rows(p["W_enc_T"], p["W_dec"], *(x.clone() for x in start))
        batch = Batch(codes, dots, p["z"], error, at, p["b_dec"], -0.37)
        low = torch.zeros(n, d, dtype=torch.bfloat16)
        g_b = form.update_rows(rows, low, batch, extra, pull, Adam(1e-2, 0.9, 0.99, 3))
        assert torch.equal(low, rows.W_enc_T.to(low.dtype))
        results.append((*rows, g_b))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(results[0][1].norm(dim=1), torch.ones(n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_missed(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    e_hat = torch.randn(70, 33, generator=generator).to(dtype)
    error = torch.randn(70, 33, generator=generator)
    exact = e_hat.double() - error.double()
    for form in (compiled, plain):
        low, loss = form.missed(e_hat, error)
        assert low.dtype == dtype and torch.equal(low, exact.float().to(dtype))
        torch.testing.assert_close(loss.double(), exact.square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_kept(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(70, 33, generator=generator).to(dtype)
    acts = torch.randint(0, 3, (70, 33), generator=generator).to(dtype)
    exact = torch.where(acts > 0, g, 0)
    for form in (compiled, plain):
        kept = g.clone()
        sums = form.where_kept(kept, acts)
        assert torch.equal(kept, exact) and sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), exact.double().sum(0), rtol=1e-5, atol=1e-5)


def test_adam_is_that_of_torch() -> None:
    w = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    peer = w.clone().requires_grad_()
    optimiser = torch.optim.Adam([peer], lr=3e-3, betas=(0.9, 0.99))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 6):
        g = torch.sin(step * w.detach() * 7) * 1e-6
        peer.grad = g.clone()
        optimiser.step()
        adam_step(w, m, v, g, Adam(3e-3, 0.9, 0.99, step))
        torch.testing.assert_close(w, peer.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thresholds_select_and_pull(dtype: torch.dtype) -> None:
    """Both forms against a loop over all entries; some lie exactly on a bound."""
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randint(-40, 41, (37, 70), generator=generator) / 16).to(dtype)
    threshold = torch.randint(2, 40, (70,), generator=generator) / 16
    threshold[::7] += 1e-4
    error = torch.randn(37, 12, generator=generator)
    W_dec = torch.randn(70, 12, generator=generator)
    reach = 1 / 8
    acts = torch.zeros(37, 70)
    dots, counts = torch.zeros(70, dtype=torch.float64), torch.zeros(70)
    for t in range(37):
        for j in range(70):
            x, theta = pre[t, j].item(), threshold[j].item()
            if x > theta:
                acts[t, j] = x
            if theta - reach < x <= theta + reach:
                dots[j] += error[t].double() @ W_dec[j].double()
                counts[j] += 1
    codes = compiled.above_threshold(pre, threshold)
    torch.testing.assert_close(dense(codes, (37, 70)), acts, rtol=0, atol=0)
    matrix = plain.above_threshold(pre, threshold).acts.float()
    torch.testing.assert_close(matrix, acts, rtol=0, atol=0)
    assert (codes.col_ptr[1:] - codes.col_ptr[:-1]).tolist() == (acts > 0).sum(0).tolist()
    for form in (compiled, plain):
        mine, number = form.near_threshold(pre, threshold, reach, error, W_dec)
        assert torch.equal(number, counts)
        coarse = form is plain and dtype == torch.bfloat16
        torch.testing.assert_close(
            mine.double(), dots, rtol=0.05 if coarse else 1e-5, atol=0.2 if coarse else 1e-5
        )


@pytest.mark.parametrize(("b", "d"), [(1, 2), (70, 33), (3, 576)])
def test_inputs_are_normalised_and_centred(b: int, d: int) -> None:
    x = 3 * torch.randn(b, d, generator=torch.Generator().manual_seed(b)) + 7
    exact, _, std = normalise(x.double())
    for form in (compiled, plain):
        z, scale = form.normalise_rows(x, EPS)
        torch.testing.assert_close(z.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scale.double(), std[:, 0] + EPS, rtol=1e-5, atol=0)
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(form.centre(x, x[0], dtype), (x - x[0]).to(dtype))
