"""Residual extraction of a profile against the same Hugging Face model cut off at the layer.

    python benchmarks/extract.py [PROFILE] [ROWS]

Both run in this process, in turn, on the same random rows; medians of three rounds. Ends with one
line: `ratio: <tokens/s of ours over theirs>`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from metasae_lib import Profile
from metasae_lib.subject import embedded
from metasae_lib.subject.model import compute_device, load_subject

ROUNDS = 3


def truncated(profile: Profile, attention: str) -> Callable[[Tensor], Tensor]:
    """Hugging Face's own model of the first L layers: ids (r, c) to residuals (r, c, d)."""
    with embedded.quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(
            embedded.snapshot(profile.model.source),
            dtype=getattr(torch, profile.model.dtype),
            attn_implementation=attention,
        ).base_model.eval()
    layers = model.layers if hasattr(model, "layers") else model.h
    del layers[profile.model.layer :]
    for name in ("norm", "ln_f"):
        if hasattr(model, name):
            setattr(model, name, torch.nn.Identity())
    model.to(compute_device(profile))

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(ids, use_cache=False).last_hidden_state
        return out

    return run


def main(name: str = "smollm2-135m", rows: str = "64") -> None:
    profile = Profile.load(name)
    subject, device = load_subject(profile), compute_device(profile)
    ways = {
        "metasae": subject.residuals,
        "hf eager": truncated(profile, "eager"),
        "hf sdpa": truncated(profile, "sdpa"),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, profile.shape.vocabulary, (int(rows), profile.text.context_length), generator=generator
    ).to(device)  # fmt: skip
    batches = ids.split(profile.model.batch_rows)

    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way(batches[0])  # warm up
    for _ in range(ROUNDS):
        for label, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for batch in batches:
                way(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            speeds[label].append(ids.numel() / (time.perf_counter() - start))
    medians = {label: statistics.median(values) for label, values in speeds.items()}

    ours = ways["metasae"](batches[0]).float()
    theirs = ways["hf eager"](batches[0]).float()
    difference = float((ours - theirs).norm() / theirs.norm())
    setting = f"layer {profile.model.layer}, {profile.model.dtype}, {device}"
    print(f"{name}, {setting}, {ids.numel()} tokens a round")
    for label, speed in medians.items():
        print(f"{label:10s} {speed:10,.0f} tokens/s")
    print(f"relative difference of residuals (metasae, hf eager): {difference:.1e}")
    print(f"ratio: {medians['metasae'] / max(medians['hf eager'], medians['hf sdpa']):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
