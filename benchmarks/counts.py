"""Exact pair counts at paper size: sparse counting against a float32 FᵀF in chunks.

n 20,480, L0 64. Sparse counting takes --tokens tokens (default 131,072); the product, which is
slow, takes --product-tokens of the same tokens and is scaled to as many. On those tokens both are
compared entry by entry. Ends with `ratio: <product seconds / sparse seconds>`.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from metasae_lib.measure.counting import CooccurrenceCounter
from metasae_lib.measure.patterns import Pattern, index_type
from metasae_lib.measure.phi import summarise

CHUNK = 1024  # tokens of one product


def firing(n_tokens: int, n: int, l0: int, generator: np.random.Generator) -> Pattern:
    """L0 distinct features a token on average, with rates spread over two orders of magnitude."""
    rates = np.exp(generator.normal(0, 1, n))
    drawn = generator.choice(n, size=(n_tokens, l0), p=rates / rates.sum())
    drawn.sort(axis=1)
    fresh = np.concatenate([np.ones((n_tokens, 1), bool), np.diff(drawn, axis=1) > 0], axis=1)
    indptr = np.concatenate([[0], np.cumsum(fresh.sum(axis=1))])
    return Pattern(indptr, drawn[fresh].astype(index_type(n)))


def first(pattern: Pattern, n_tokens: int) -> Pattern:
    """The first tokens of a pattern."""
    return Pattern(pattern.indptr[: n_tokens + 1], pattern.indices[: pattern.indptr[n_tokens]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**17)
    parser.add_argument("--product-tokens", type=int, default=2 * CHUNK)
    parser.add_argument("--n", type=int, default=20480)
    parser.add_argument("--l0", type=int, default=64)
    options = parser.parse_args()
    n, generator = options.n, np.random.default_rng(0)
    pattern = firing(options.tokens, n, options.l0, generator)
    CooccurrenceCounter(n).update(first(pattern, 10))  # compiles

    compared = CooccurrenceCounter(n)
    compared.update(first(pattern, options.product_tokens))
    ours = compared.counts().n11
    product = torch.zeros(n, n)
    seconds_product = 0.0
    for start in range(0, options.product_tokens, CHUNK):
        part = first(pattern, start + CHUNK)
        tail = Pattern(part.indptr[start:] - part.indptr[start], part.indices[part.indptr[start] :])
        matrix = torch.from_numpy(tail.matrix(n, np.ones(len(tail.indices), np.float32)).toarray())
        started = time.perf_counter()
        product += matrix.T @ matrix
        seconds_product += time.perf_counter() - started
    assert np.array_equal(ours, product.numpy()), "the two counts differ"
    del product, ours, compared

    counter = CooccurrenceCounter(n)
    step = 8192  # tokens at a time, as a scan gives them
    started = time.perf_counter()
    for start in range(0, options.tokens, step):
        part = first(pattern, min(start + step, options.tokens))
        counter.update(
            Pattern(part.indptr[start:] - part.indptr[start], part.indices[part.indptr[start] :])
        )
    counts = counter.counts()
    seconds = time.perf_counter() - started

    started = time.perf_counter()
    summary = summarise(counts)
    seconds_summary = time.perf_counter() - started

    million = 1e6 / options.tokens
    million_product = 1e6 / options.product_tokens
    l0, threads = len(pattern.indices) / options.tokens, torch.get_num_threads()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"n {n:,}, L0 {l0:.1f}, {threads} threads; seconds per million tokens")
    print(f"sparse counts  {seconds * million:10.1f} ({options.tokens:,} tokens run)")
    print(
        f"float32 FᵀF    {seconds_product * million_product:10.1f} "
        f"({options.product_tokens:,} tokens run, scaled)"
    )
    print(f"same integers on the {options.product_tokens:,} tokens that both took")
    print(f"summary of φ   {seconds_summary:10.1f} s in all for {summary.n_pairs:,} pairs")
    print(f"peak memory    {peak:10.1f} GiB, with three matrices of {4 * n * n / 2**30:.1f} GiB")
    print(f"ratio: {seconds_product * million_product / (seconds * million):.1f}")


if __name__ == "__main__":
    main()
