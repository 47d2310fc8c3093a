"""Whole training steps in CUDA graphs: the steps that tests/test_capture.py replays on the CPU."""

from typing import Any

import pytest
import torch
from captured import BAD, LOOPS, Capture, Loop, train

RANDOM = {"pcgrad", "gradvac", "rlw", "rgw", "flat samo", "gradvac per tensor"}
"""A graph draws other numbers than the steps one by one."""


class Graph:
    """A CUDA graph of the block, which runs once at its end, as capturing alone runs nothing."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._context = torch.cuda.graph(self._graph)
        self.replay = self._graph.replay

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if error[0] is None:
            self.replay()


@pytest.mark.parametrize("name", LOOPS)
def test_replays_are_steps(device, name):
    make, call, *others = LOOPS[name]
    loops = [Loop(make, call, *others, device=device.type) for _ in range(2)]
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):  # where warm-up has to run
            actual, state = train(loops[0], Graph())
        torch.cuda.synchronize()
    else:
        actual, state = train(loops[0], Capture())
    expected, other = train(loops[1])
    assert [bool(skipped.all()) for _, skipped, *_ in actual] == [step == BAD for step in range(3, 8)]
    assert all(value.isfinite().all() for value in state.values())
    if name not in RANDOM:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)
