"""Dictionaries: initialisation, exact selection, normalisation, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metasae_lib.study.errors import DictionaryError
from metasae_lib.train.dictionary import BatchTopK, Dictionary, JumpReLU, denormalise, normalise


def test_normalise_by_hand_and_back() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]], dtype=torch.float64)
    z, mean, std = normalise(x)
    assert mean.tolist() == [[2.0], [2.0]]
    assert std[:, 0].tolist() == pytest.approx([1.0, 12**0.5])
    assert z[0].tolist() == pytest.approx([-1 / 1.00001, 0.0, 1 / 1.00001])
    torch.testing.assert_close(denormalise(z, mean, std), x)


def test_initialisation_follows_the_seed() -> None:
    sae, same, other = BatchTopK(20, 50, 3, 7), BatchTopK(20, 50, 3, 7), BatchTopK(20, 50, 3, 8)
    assert sae.W_enc.shape == (20, 50) and sae.W_dec.shape == (50, 20)
    assert torch.equal(sae.W_enc, same.W_enc) and not torch.equal(sae.W_enc, other.W_enc)
    torch.testing.assert_close(sae.W_dec, sae.W_enc.T / sae.W_enc.T.norm(dim=1, keepdim=True))
    assert sae.W_enc.abs().max() <= 20**-0.5 and not sae.b_dec.any()
    assert not any(p.requires_grad for p in sae.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_encode_keeps_exactly_k_of_the_batch(dtype: torch.dtype) -> None:
    sae = BatchTopK(6, 40, 3, seed=1).to(dtype)
    sae.b_dec.data += 0.3
    z = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    acts = sae.encode(z)
    assert acts.dtype == dtype and (acts > 0).sum() == 30
    pre = ((z - 0.3) @ sae.W_enc).flatten()
    order = sorted(range(400), key=lambda i: (-pre[i].item(), i))[:30]
    assert sorted(order) == acts.flatten().nonzero()[:, 0].tolist()
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)


def test_ties_go_to_the_lowest_flat_index() -> None:
    sae = BatchTopK(2, 4, 1)
    sae.W_enc.data = torch.ones(2, 4)
    acts = sae.encode(torch.ones(3, 2))
    assert acts.flatten().nonzero()[:, 0].tolist() == [0, 1, 2]


def test_thresholds_select_per_feature() -> None:
    sae = BatchTopK(2, 3, 1)
    with pytest.raises(DictionaryError, match="calibrate"):
        sae.encode_threshold(torch.ones(1, 2))
    sae.W_enc.data = torch.tensor([[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    sae.threshold = torch.tensor([0.5, float("inf"), -9.0])
    assert sae.encode_threshold(torch.tensor([[2.0, 0.0]])).tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_saved_and_loaded(tmp_path: Path, calibrated: bool) -> None:
    sae = BatchTopK(6, 9, 2, seed=4)
    if calibrated:
        sae.threshold = torch.rand(9)
    sae.save(tmp_path, {"hook_name": "blocks.3.hook_resid_pre"})
    back = BatchTopK.load(tmp_path)
    assert (back.d_in, back.n_features, back.k, back.seed) == (6, 9, 2, 4)
    for mine, loaded in zip(sae.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(mine, loaded)
    assert back.W_enc.T.is_contiguous()
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == ("jumprelu" if calibrated else "batchtopk")
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_pre"
    with pytest.raises(DictionaryError, match="batchtopk dictionary, not jumprelu"):
        JumpReLU.load(tmp_path)


def test_jumprelu_saved_and_loaded(tmp_path: Path) -> None:
    sae = JumpReLU(6, 9, 2)
    sae.threshold = torch.rand(9) / 2
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    sae.save(tmp_path)
    torch.testing.assert_close(JumpReLU.load(tmp_path).encode(z), sae.encode(z), rtol=0, atol=0)


@pytest.mark.parametrize("harm", ["cut", "missing", "shape", "foreign"])
def test_bad_files_are_named(tmp_path: Path, harm: str) -> None:
    BatchTopK(6, 9, 2).save(tmp_path)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif harm == "missing":
        weights.unlink()
    elif harm == "shape":
        config.write_text(config.read_text().replace('"d_in": 6', '"d_in": 5'))
    else:
        config.write_text('{"architecture": "standard"}')
    named = "cfg.json" if harm == "foreign" else "sae_weights.safetensors"
    with pytest.raises(DictionaryError, match=named):
        BatchTopK.load(tmp_path)


def test_impossible_sizes() -> None:
    with pytest.raises(DictionaryError, match="k between 1 and n_features"):
        BatchTopK(6, 9, 10)


@pytest.mark.parametrize("kind", [BatchTopK, JumpReLU])
@pytest.mark.parametrize("shape", [(2, 2, 6), (6,), (4, 1), (4, 9)])
def test_other_shapes_are_refused(kind: type[Dictionary], shape: tuple[int, ...]) -> None:
    """Three dimensions would keep k times the first of them, and a width of 1 would be repeated."""
    sae = kind(6, 8, 2)
    sae.threshold = torch.zeros(8)
    for function in (sae.encode, sae.encode_threshold, sae.decode):
        with pytest.raises(DictionaryError, match="give it the shape"):
            function(torch.zeros(shape))
