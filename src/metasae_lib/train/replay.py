"""What a GPU does over and over, handed to it once: CUDA graphs.

A step of a small dictionary is some two hundred short kernels, and starting them takes the host
four times as long as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Replay:
    """Calls a function of tensors, from the third time on as one graph of its kernels.

    The function may change tensors in place, as long as it is the same ones each time, and must not
    wait for the GPU. What it returns is overwritten by the next call. On a CPU, and inside a
    function that is itself being recorded, it is simply called.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[Any, tuple[Tensor, ...], Any] | None] = {}

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs). key: says what else the kernels and their sizes depend on."""
        if not inputs[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        key = key, *(x.shape for x in inputs)
        if key not in self._graphs:  # kernels are compiled and workspaces made outside of graphs
            self._graphs[key] = None
            return function(*inputs)
        recorded = self._graphs[key] or _record(function, inputs)
        self._graphs[key] = recorded
        graph, places, outputs = recorded
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return outputs


@cache
def _pool() -> Any:
    """One for all graphs, which run one after the other: they share memory between kernels."""
    return torch.cuda.graph_pool_handle()


def _record(
    function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> tuple[Any, tuple[Tensor, ...], Any]:
    """The graph of a call, the tensors that it reads in place of the inputs, and its outputs."""
    places = tuple(x.clone() for x in inputs)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # torch.cuda.graph would collect all garbage first
        graph.capture_begin(pool=_pool())
        outputs = function(*places)
        graph.capture_end()
    current.wait_stream(stream)
    return graph, places, outputs
