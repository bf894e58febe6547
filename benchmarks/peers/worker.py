"""One library's training step, timed on request: reads a line, does a step, prints its seconds.

Runs in our environment or in that of the peers, on a GPU if there is one; benchmarks/step.py talks
to it through pipes.
All see the same batches, the same sizes, Adam at 3e-4, AuxK on the same dead features.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

LEARNING_RATE = 3e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[Tensor], object]


def batches(d: int, b: int) -> list[Tensor]:
    """Sparse sums of directions with noise, each input of unit variance."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d, d, generator=generator)
    made = []
    for _ in range(4):
        weights = torch.rand(b, 4 * d, generator=generator)
        weights *= torch.rand(b, 4 * d, generator=generator) < 30 / (4 * d)
        x = weights @ directions + torch.randn(b, d, generator=generator)
        made.append(((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).to(DEVICE))
    return made


def silence(rows: Tensor, dead: int) -> None:
    """Make the first features too weak to be selected. rows: (n, d), feature by feature."""
    with torch.no_grad():
        rows[:dead] *= 1e-3


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def ours(
    dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int, joint: bool, parts: bool = False
) -> Step:
    """parts: print what each loop of every step takes as well, in seconds, on one line."""
    from metasae_lib.study.arms import ArmSpec
    from metasae_lib.study.profile import Profile
    from metasae_lib.train.trainer import Trainer

    sizes = {"n_features": n, "k": k, "n_meta_features": round(0.09 * n), "meta_k": 8}
    settings = {
        "batch_tokens": b, "train_tokens": b, "dtype": str(dtype)[6:], "k_aux": d // 2,
        "learning_rate": LEARNING_RATE, "n_primary_steps": 10, "n_meta_steps": 5,
    }  # fmt: skip
    profile = Profile.load("tiny", {"dictionary": sizes, "training": settings})
    spec = ArmSpec("joint", 0, 0.3, 1.0) if joint else ArmSpec("solo", 0)
    trainer = Trainer(spec, profile, d, DEVICE)
    learner = trainer.primary
    silence(learner.W_enc_T, dead)
    learner._low.copy_(learner.W_enc_T)
    learner.silent[:dead] = 1000
    if not parts:
        return trainer.step
    seconds: dict[str, float] = {}

    def timed(name: str, loop: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            started = time.perf_counter()
            result = loop(*arguments)
            synchronise()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return run

    loops = inspect.getmembers(learner.kernels, inspect.isfunction)
    learner.kernels = SimpleNamespace(**{name: timed(name, loop) for name, loop in loops})
    learner._products = timed("encoder product, with centring", learner._products)
    learner._aux = timed("AuxK", learner._aux)

    def step(z: Tensor) -> None:
        seconds.clear()
        trainer.step(z)
        print(json.dumps(seconds))

    return step


def dense(dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int) -> Step:
    """Plain autograd with flat top-k and AuxK, as anyone would write it first."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(1)) / d**0.5
    W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
    silence(rows, dead)
    W_dec.data = W_dec.data.to(DEVICE)
    W_enc = nn.Parameter(rows.T.contiguous().to(DEVICE))
    b_dec = nn.Parameter(torch.zeros(d, device=DEVICE))
    optimiser = torch.optim.Adam([W_enc, W_dec, b_dec], lr=LEARNING_RATE, betas=(0.9, 0.99))
    silent = torch.zeros(n, device=DEVICE)
    silent[:dead] = 1000

    def keep(x: Tensor, k: int, dim: int) -> Tensor:
        top = x.topk(k, dim=dim, sorted=False)
        return torch.zeros_like(x).scatter(dim, top.indices, top.values)

    def step(z: Tensor) -> None:
        nonlocal silent
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            pre = ((z - b_dec) @ W_enc).relu()
            acts = keep(pre.flatten(), k * b, 0).view_as(pre)
            error = z - (acts @ W_dec + b_dec)
            loss = error.square().mean()
            silent = torch.where((acts > 0).any(0), 0, silent + 1)
            asleep = (silent >= 5).nonzero()[:, 0]
            if len(asleep):
                part = keep(pre[:, asleep], min(d // 2, len(asleep)), 1)
                loss = loss + (error.detach() - part @ W_dec[asleep]).square().mean() / 32
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def dictionary_learning(dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int) -> Step:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        steps=10**6, activation_dim=d, dict_size=n, k=k, layer=0, lm_name="", lr=LEARNING_RATE,
        warmup_steps=0, device=str(DEVICE), seed=0,
    )  # fmt: skip
    silence(trainer.ae.encoder.weight, dead)
    trainer.num_tokens_since_fired[:dead] = 10**9
    count = 0

    def step(z: Tensor) -> None:
        nonlocal count
        count += 1  # from 1: the first step of a training also finds a geometric median
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            trainer.update(count, z)

    return step


def saelens(dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int) -> Step:
    """The body of SAELens' own training step, without its activation store and its logging."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d, d_sae=n, k=k)).to(DEVICE)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    silence(sae.W_enc.T, dead)
    silent = torch.zeros(n, device=DEVICE)
    silent[:dead] = 10**6
    seen = torch.zeros(n, device=DEVICE)

    def step(z: Tensor) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = sae.training_forward_pass(TrainStepInput(z, {}, silent >= 1000, 0, False))
            with torch.no_grad():
                fired = out.feature_acts.bool().float()
                silent.add_(1)[fired.sum(-2).bool()] = 0
                seen.add_(fired.sum(0))
        out.loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def sparsify(dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int) -> Step:
    """The body of sparsify's own training step: k entries a token, gathered decoder rows."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), device=str(DEVICE))
    optimiser = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
    silence(coder.encoder.weight, dead)
    silent = torch.zeros(n, device=DEVICE)
    silent[:dead] = 10**6

    def step(z: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = coder(z, dead_mask=silent >= 1000)
        silent.add_(1)[out.latent_indices.flatten()] = 0
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step


def product(dtype: torch.dtype, d: int, n: int, k: int, b: int, dead: int) -> Step:
    """The floor: the encoder's product alone."""
    rows, low = torch.randn(n, d).to(DEVICE, dtype), batches(d, b)[0].to(dtype)
    out = torch.empty(b, n, dtype=dtype, device=DEVICE)
    return lambda z: torch.mm(low, rows.T, out=out)


def main() -> None:
    name, dtype, *numbers = sys.argv[1:]
    d, n, k, b, dead = map(int, numbers)
    sizes = (getattr(torch, dtype), d, n, k, b, dead)
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(*sizes, joint=False),
        "ours, parts": lambda: ours(*sizes, joint=False, parts=True),
        "ours, joint": lambda: ours(*sizes, joint=True),
        "dense autograd": lambda: dense(*sizes),
        "dictionary_learning": lambda: dictionary_learning(*sizes),
        "SAELens": lambda: saelens(*sizes),
        "sparsify": lambda: sparsify(*sizes),
        "encoder product": lambda: product(*sizes),
    }
    step, data = makers[name](), batches(d, b)
    print("ready", flush=True)
    for count, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        step(data[count % len(data)])
        synchronise()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
