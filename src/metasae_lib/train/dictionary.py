"""Sparse autoencoders over normalised residuals, in SAELens' file format.

Every dictionary that is trained here works in the space of per-token normalised inputs:
:func:`normalise` once, :func:`denormalise` to go back. One that was trained elsewhere may work in
another, see :func:`enter`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metasae_lib.study import DictionaryError, atomic_write
from metasae_lib.train.kernels.plain import top_mask

EPS = 1e-5
_FORMAT = "6.54.12"  # the SAELens whose format this is: from 6.0 on, metadata are kept
_SCALE = "scale.safetensors"
_OWN = "metasae"  # the section of cfg.json's metadata that is ours
Space = Literal["layer_norm", "constant_norm_rescale", "none"]  # SAELens' normalize_activations
SPACES: tuple[Space, ...] = get_args(Space)


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-vector normalisation, SAELens' "layer_norm": z = (x - mean) / (std + 1e-5).

    x: (..., d). The standard deviation is the unbiased one. Returns z (..., d), mean (..., 1) and
    std (..., 1).
    """
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True)
    return centred / (std + EPS), mean, std


def denormalise(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo :func:`normalise`: x = z (std + 1e-5) + mean. z: (..., d), mean and std (..., 1)."""
    return z * (std + EPS) + mean


def enter(x: Tensor, space: Space) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals as a dictionary of a space reads them, u = (x - shift) / scale, token by token.

    x: (..., d). Returns u (..., d), shift and scale (..., 1). `layer_norm` is :func:`normalise`;
    `constant_norm_rescale` gives every token the length √d; `none` leaves x as it is.
    """
    if space == "layer_norm":
        z, mean, std = normalise(x)
        return z, mean, std + EPS
    one = torch.ones_like(x[..., :1])
    if space == "none":
        return x, 0 * one, one
    scale = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return x / scale, 0 * one, scale


class Dictionary(nn.Module, ABC):
    """What BatchTopK and JumpReLU share: weights, products, thresholds and files.

    W_enc (d, n), W_dec (n, d) with unit rows (unless training was scaled), b_dec (d,), float32;
    threshold (n,) or None while not calibrated. W_enc is stored feature by feature: it is the
    transposed view of a contiguous (n, d) matrix, as training wants it. Parameters need no gradient
    by default; `requires_grad_()` turns autograd on.

    What is trained here has no encoder bias and reads normalised inputs z. A dictionary that was
    trained elsewhere has a bias b_enc (n,), and reads inputs u of its own `space` wherever z is
    written here.
    """

    kind: str
    space: Space = "layer_norm"
    threshold: Tensor | None
    b_enc: Tensor | None
    scale: Tensor | None = None  # (d,): what decoder rows were multiplied by, see `train.start`

    def __init__(self, d_in: int, n_features: int, k: int, seed: int = 0) -> None:
        super().__init__()
        if d_in < 2 or n_features < 1 or not 1 <= k <= n_features:
            raise DictionaryError(
                f"a dictionary with d_in {d_in}, n_features {n_features} and k {k} cannot be: "
                "d_in must be at least 2 and k between 1 and n_features"
            )
        self.d_in, self.n_features, self.k, self.seed = d_in, n_features, k, seed
        # Kaiming-uniform over the d inputs of a feature: bound = sqrt(6 / ((1 + 5) d)).
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(d_in)
        encoder = torch.empty(n_features, d_in).uniform_(-bound, bound, generator=generator)
        decoder = encoder / encoder.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(encoder.T, requires_grad=False)
        self.W_dec = nn.Parameter(decoder, requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d_in), requires_grad=False)
        self.register_buffer("threshold", None)
        self.register_buffer("b_enc", None)

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """The training form. z: (b, d) normalised. Returns (b, n), zero where not kept."""

    def pre_activations(self, z: Tensor) -> Tensor:
        """(z - b_dec) W_enc + b_enc. z: (b, d) normalised. Returns (b, n).

        Raises DictionaryError for another shape, as does what is built on this.
        """
        _check_shape("z", z, self.d_in)
        pre = (z - self.b_dec) @ self.W_enc
        return pre if self.b_enc is None else pre + self.b_enc

    @property
    def directions(self) -> Tensor:
        """Decoder rows (n, d), of unit length as in training: what features are compared by."""
        return self.W_dec if self.scale is None else self.W_dec / self.scale.to(self.W_dec)

    def decode(self, acts: Tensor) -> Tensor:
        """acts W_dec + b_dec. acts: (b, n). Returns (b, d). Raises DictionaryError."""
        _check_shape("acts", acts, self.n_features)
        return acts @ self.W_dec + self.b_dec

    def encode_threshold(self, z: Tensor) -> Tensor:
        """Pre-activations above each feature's own threshold, zero elsewhere.

        z: (b, d). Returns (b, n). Raises DictionaryError if no threshold was calibrated.
        """
        if self.threshold is None:
            raise DictionaryError("this dictionary has no thresholds: calibrate it first")
        pre = self.pre_activations(z)
        return pre * ((pre > self.threshold) & (pre > 0))

    def save(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write `cfg.json` and `sae_weights.safetensors` as SAELens reads them.

        With thresholds the export is a SAELens `jumprelu` dictionary; b_enc = 0 if there is none.
        metadata: further entries of cfg.json's metadata (hook_name, model_name, context_size,
        prepend_bos, ...). The weights are written first, the configuration last, each atomically.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: w.cpu().contiguous() for name, w in self.state_dict().items()}
        weights.setdefault("b_enc", torch.zeros(self.n_features, dtype=self.W_enc.dtype))
        own = {"kind": self.kind, "k": self.k, "seed": self.seed}
        config = {
            "architecture": "jumprelu" if self.threshold is not None else "batchtopk",
            "d_in": self.d_in,
            "d_sae": self.n_features,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": self.space,
            "k": self.k,
            "rescale_acts_by_decoder_norm": False,
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": _FORMAT, **(metadata or {}), _OWN: own},
        }
        with atomic_write(folder / "sae_weights.safetensors") as path:
            save_file(weights, path)
        if self.scale is not None:  # in a file of its own, which SAELens does not ask for
            with atomic_write(folder / _SCALE) as path:
                save_file({"scale": self.scale.cpu().contiguous()}, path)
        with atomic_write(folder / "cfg.json") as path:
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote; `Dictionary.load` reads either kind.

        DictionaryError names a missing, cut or foreign file.
        """
        folder = Path(folder)
        path = folder / "cfg.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            own = config["metadata"][_OWN]
            kind, k, seed = own["kind"], int(own["k"]), int(own["seed"])
            shape = int(config["d_in"]), int(config["d_sae"])
            space: Space = config["normalize_activations"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DictionaryError(f"{path} is missing or not one of ours: save it again") from None
        kinds = {one.kind: one for one in Dictionary.__subclasses__() if issubclass(one, cls)}
        if kind not in kinds:
            raise DictionaryError(f"{path} holds a {kind} dictionary, not {' or '.join(kinds)}")
        path = folder / "sae_weights.safetensors"
        try:
            weights = load_file(path)
        except Exception:  # safetensors raises types of its own on a cut or foreign file
            raise DictionaryError(f"{path} is missing or damaged: save it again") from None
        sae: Self = kinds[kind](*shape, k, seed)
        for name, parameter in sae.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                size = tuple(parameter.shape)
                raise DictionaryError(f"{path} has no {name} of shape {size}: save it again")
            parameter.data = weights[name]
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        sae.threshold = weights.get("threshold")
        sae.space, b_enc = space, weights["b_enc"]
        if space != "layer_norm" or bool(b_enc.any()):
            sae.b_enc = b_enc
        if (folder / _SCALE).exists():
            sae.scale = load_file(folder / _SCALE)["scale"]
        return sae


class BatchTopK(Dictionary):
    """Keeps the k·b largest pre-activations of a batch of b inputs (Gao et al. 2024, §3.1).

    d_in: input dimension d. n_features: number of features n. k: mean activations per input.
    seed: of the initial weights (W_enc Kaiming-uniform, W_dec = W_encᵀ with unit rows).
    """

    kind = "batchtopk"

    def encode(self, z: Tensor) -> Tensor:
        """The training form: exactly the k·b largest of the batch after relu, zero elsewhere.

        z: (b, d) normalised, any float type of the weights. Returns (b, n). Ties go to the lowest
        flat index. The result for one input depends on the rest of its batch.
        """
        positive = self.pre_activations(z).relu()
        keep = top_mask(positive.detach().flatten(), self.k * z.shape[0]).view_as(positive)
        return positive * keep


class JumpReLU(Dictionary):
    """Keeps each pre-activation above its feature's own threshold (Rajamanoharan et al. 2024).

    k: the mean activations per input that training aims at. Thresholds are part of the dictionary
    from the start.
    """

    kind = "jumprelu"
    threshold: Tensor

    def __init__(self, d_in: int, n_features: int, k: int, seed: int = 0) -> None:
        super().__init__(d_in, n_features, k, seed)
        self.threshold = torch.full((n_features,), 1e-3)

    def encode(self, z: Tensor) -> Tensor:
        """The same in training and after. z: (b, d) normalised. Returns (b, n)."""
        return self.encode_threshold(z)


def _check_shape(name: str, x: Tensor, width: int) -> None:
    """Refuse what torch would broadcast: of a batch of three dimensions, k counts the first."""
    if x.ndim != 2 or x.shape[1] != width:
        raise DictionaryError(f"{name} is {tuple(x.shape)}: give it the shape (b, {width})")
