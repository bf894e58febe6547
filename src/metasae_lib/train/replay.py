"""What a GPU does over and over, handed to it once: CUDA graphs.

A step of a small dictionary is some two hundred short kernels, and starting them takes the host
four times as long as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Workspace:
    """Memory that is used over again at every step, shared by the arms of a group.

    Called as `torch.empty`, it gives one matrix of each shape, type and device. Recorded graphs,
    which run one after the other, share what they need between their kernels.
    """

    def __init__(self) -> None:
        self.empty = cache(torch.empty)
        self.first: Any = None  # the first graph: their memory is there as long as it is

    def __call__(self, *size: Any, **options: Any) -> Tensor:
        return self.empty(*size, **options)


class _Recorded(NamedTuple):
    graph: Any
    places: tuple[Tensor, ...]  # what it reads in place of the inputs
    outputs: Any


class Replay:
    """Calls a function of tensors, from the second time on as one graph of its kernels.

    The function may read other tensors than its inputs, and change them in place, as long as it is
    the same ones each time; it must not wait for the GPU. What it returns may be overwritten by the
    next call of any function that shares its workspace. On a CPU, and inside a function that is
    itself being recorded, it is simply called.
    """

    def __init__(self, workspace: Workspace, device: torch.device) -> None:
        self._workspace, self._on_gpu = workspace, device.type == "cuda"
        self._graphs: dict[Hashable, _Recorded | None] = {}

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs). key: says what else the kernels and their sizes depend on."""
        if not self._on_gpu or torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        key = key, *(x.shape for x in inputs)
        if key not in self._graphs:  # kernels are compiled and workspaces made outside of graphs
            self._graphs[key] = None
            return function(*inputs)
        recorded = self._graphs[key] or self._record(function, inputs)
        self._graphs[key] = recorded
        for place, x in zip(recorded.places, inputs, strict=True):
            place.copy_(x)
        recorded.graph.replay()
        return recorded.outputs

    def _record(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Recorded:
        places, shared = tuple(x.clone() for x in inputs), self._workspace
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # torch.cuda.graph would collect all garbage first
            graph.capture_begin(*(() if shared.first is None else (shared.first.pool(),)))
            outputs = function(*places)
            graph.capture_end()
        current.wait_stream(stream)
        shared.first = shared.first or graph
        return _Recorded(graph, places, outputs)
