"""CUDA graphs, by rule: a step captured once and replayed on new data is the step itself, whatever the state it carries."""

import re

import pytest
import torch
from captured import BAD, LOOPS, Capture, CaptureError, Loop, multi, of_a_function, train, whole
from device import CSRC
from multitask_models import TASKS

import mtlkernels as mtl


@pytest.mark.parametrize("name", LOOPS)
def test_replays_are_steps(name):
    (actual, state), (expected, other) = train(Loop(*LOOPS[name]), Capture()), train(Loop(*LOOPS[name]))
    assert [bool(skipped.all()) for _, skipped, *_ in actual] == [step == BAD for step in range(3, 8)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def test_state_that_is_bound_to_a_new_tensor_is_seen():
    class Rebinds(mtl.Mean):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.ones((), dtype=torch.float64))

        def weights(self, gram, *others):
            self.factor = self.factor * 0.5
            return super().weights(gram, *others) * self.factor

    loop = Loop(lambda inner, model: mtl.MultiTaskOptimizer(inner, Rebinds(), heads=model.head_parameters()), whole)
    loop.step()
    before = loop.state()["weighting factor"].data_ptr()
    with Capture() as capture:
        loop.step()
    assert loop.state()["weighting factor"].data_ptr() != before
    capture.replay()
    capture.replay()
    assert loop.info.weights.tolist() == [1 / 12] * 3  # of the captured step, again and again


def test_an_inner_optimizer_that_is_not_fused_ends_a_capture():
    """And the info has said so."""
    make = multi("mean")
    loop = Loop(lambda inner, model: make(torch.optim.AdamW(model.parameters()), model), whole)
    loop.step()
    assert loop.info.host_reads == 1
    with pytest.raises(CaptureError, match="makes the host wait"), Capture():
        loop.step()


def test_groups_are_formed_on_the_host():
    loop = Loop(lambda inner, model: mtl.SelectiveGroupOptimizer(inner, warmup=0, tasks=TASKS), of_a_function)
    with pytest.raises(CaptureError), Capture():
        loop.step()


# --- the compiled CUDA code ---------------------------------------------------------------------------------------------

FORBIDDEN = (
    r"cuda\w*Malloc\w*",  # memory that torch's allocator does not know, and a graph cannot keep
    r"cudaFree\w*",
    r"cuda\w*Synchronize\w*",
    r"cudaMemcpy\w*",
    r"cudaMemset(?!Async)\w*",
    r"cudaStreamCreate\w*|cudaEventCreate\w*|cudaStreamQuery|cudaEventQuery",
    r"cudaStreamLegacy|cudaStreamPerThread|<<<[^>]*,\s*(?:0|nullptr)\s*>>>",
    r"\b(?:new|malloc|calloc)\b(?=[^;\n]*\bcuda)",
    r"aoti_torch_item\w*|\.item\b|data_ptr_host",
    r"__managed__|\b__device__\s+(?:static\s+)?\w+\s+\w+\s*(?:\[[^\]]*\])?\s*;",  # state between launches
)
"""What a launch path must not call, so that it can be captured."""


def offences(text: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return [match.group() for pattern in FORBIDDEN for match in re.finditer(pattern, code)]


def test_bindings_and_launchers_call_nothing_that_ends_a_capture():
    files = [*(CSRC / "cuda").glob("*"), *(CSRC / "bindings").glob("*_cuda.cpp"), *(CSRC / "bindings").glob("*.h")]
    assert len(files) > 20
    assert {file.name: found for file in files if (found := offences(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "cudaMalloc(&scratch, bytes);",
        "cudaMallocAsync(&scratch, bytes, stream);",
        "cudaStreamSynchronize(stream);",
        "cudaDeviceSynchronize();",
        "cudaMemcpyAsync(a, b, n, cudaMemcpyHostToDevice, stream);",
        "kernel<<<grid, block, 0, 0>>>(x);",
        "kernel<<<grid, block, 0, nullptr>>>(x);",
        "aoti_torch_item_float64(x, &value);",
        "__device__ int counter;",
    ],
)
def test_the_rule_sees(line):
    assert offences(f"void launch() {{\n  {line}\n}}")
