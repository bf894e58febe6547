"""What counting adds to a scan: its time against the language model's own pass.

A real model at a real layer (profile smollm2-135m), n 4,096, L0 32, an untrained dictionary with
thresholds calibrated on part of the text. --rows rows of the text are run (default 256, 32,512
tokens) and scaled to a million. Ends with `ratio: <model seconds / counting seconds>`; counting
must cost less than a tenth of the pass, so above 10 is the goal. The encoder product, which a scan
needs too, is given on its own line.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch

from metasae_lib import Profile, Run
from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.passes import pre_activations, product_dtype
from metasae_lib.measure.patterns import above
from metasae_lib.measure.thresholds import Calibrator
from metasae_lib.subject.corpus import load_tokens
from metasae_lib.subject.model import load_subject
from metasae_lib.train.dictionary import BatchTopK, normalise

N, L0 = 4096, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--profile", default="smollm2-135m")
    options = parser.parse_args()
    profile = Profile.load(options.profile)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(profile, folder)
        rows = np.asarray(load_tokens(run).rows("scan")[: options.rows])
    subject, batch, dtype = load_subject(profile), profile.model.batch_rows, product_dtype(run)
    subject.residuals(rows[:batch])
    parts, started = [], time.perf_counter()
    for start in range(0, len(rows), batch):
        parts.append(subject.residuals(rows[start : start + batch])[:, 1:].flatten(0, 1))
    seconds_model = time.perf_counter() - started
    x = torch.cat(parts)

    sae = BatchTopK(x.shape[1], N, L0).to(x.device)
    calibrator = Calibrator(N, L0, window=(1e-6, 1e6))
    for part in x[:8192].split(2048):
        calibrator.update(pre_activations(sae, normalise(part.float())[0], dtype))
    theta = calibrator.result().threshold("rate").to(x.device)

    counter = CooccurrenceCounter(N, device=x.device)
    seconds_encoder = seconds_counts = 0.0
    warm = True
    for part in [x[:64], *x.split(8192)]:  # the first compiles
        started = time.perf_counter()
        pre = pre_activations(sae, normalise(part.float())[0], dtype)
        encoded = time.perf_counter()
        on_cpu = x.device.type == "cpu"
        counter.update(above(pre, theta)[0] if on_cpu else pre > theta)
        if warm:
            counter.counts()
            counter, warm = CooccurrenceCounter(N, device=x.device), False
            continue
        seconds_encoder += encoded - started
        seconds_counts += time.perf_counter() - encoded
    started = time.perf_counter()
    counts = counter.counts()
    seconds_counts += time.perf_counter() - started

    million = 1e6 / len(x)
    print(f"{profile.model.source} layer {profile.model.layer}, n {N:,}, L0 {counts.l0:.1f}, "
          f"{len(x):,} tokens, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"model pass       {seconds_model * million:8.1f} s per million tokens")
    print(f"encoder product  {seconds_encoder * million:8.1f} s per million tokens")
    print(f"firing + counts  {seconds_counts * million:8.1f} s per million tokens")
    print(f"counts / model pass: {seconds_counts / seconds_model:.4f} (goal: below 0.1)")
    print(f"ratio: {seconds_model / seconds_counts:.1f}")


if __name__ == "__main__":
    main()
