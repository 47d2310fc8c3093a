"""CUDA graphs, by rule: a step captured once and replayed on new data is the step itself, whatever the state it carries."""

import re

import pytest
import torch
from captured import Capture, CaptureError
from device import CSRC
from multitask_models import TASKS, Net
from priority_models import task_net
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings import REGISTRY

OPTIONS = {"constant": {"weights": [0.5, 1.0, 2.0]}, "cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}


class Loop:
    """A model that is trained on whatever its static input holds."""

    def __init__(self, make, call, scaler: bool = False, model=lambda: Net(width=4), shape=(6, 4)) -> None:
        self.model = model()
        self.x = torch.zeros(shape)
        inner = torch.optim.AdamW(self.model.parameters(), 0.01, fused=True)
        self.optimizer = make(inner, self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if scaler else None
        self.call = call
        self.info = None

    def losses(self) -> dict[str, Tensor]:
        return {
            task: (y - k).square().mean()
            for k, (task, y) in enumerate(self.model(self.x.to(next(self.model.parameters()).dtype)).items())
        }

    def load(self, step: int, bad: bool = False) -> None:
        """A new batch in the memory of the last."""
        self.x.copy_(torch.randn(self.x.shape, generator=torch.Generator().manual_seed(step)) * (torch.nan if bad else 1.0))

    def step(self) -> None:
        self.info = self.call(self)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step leaves to the next one."""
        result = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for n, state in enumerate(self.optimizer.state.values()):
            result |= {f"inner {n} {name}": value for name, value in state.items()}
        for name in ("weighting", "weightings", "affinity"):
            module = getattr(self.optimizer, name, None)
            if module is not None:
                result |= {f"{name} {key}": value for key, value in module.named_buffers()}
        if self.scaler is not None:
            result |= {"scale": self.scaler._scale, "growth": self.scaler._growth_tracker}
        return {name: value.detach() for name, value in result.items()}


def multi(weighting="upgrad", **options):
    def make(inner: torch.optim.Optimizer, model: Net) -> mtl.MultiTaskOptimizer:
        method = mtl.get_weighting(weighting, **OPTIONS.get(weighting, {}))
        own = {"per": {"first": list(model.encoder[0].parameters())}} if options.get("per") == "groups" else {}
        return mtl.MultiTaskOptimizer(inner, method, heads=model.head_parameters(), **(options | own))

    return make


def flat(**options):
    return lambda inner, model: mtl.FlatMinimaOptimizer(inner, "imtl_g", heads=model.head_parameters(), **options)


def whole(loop: Loop):
    return loop.optimizer.step(loop.losses())


def of_a_function(loop: Loop):
    return loop.optimizer.step(loop.losses)


def backward_and_step(loop: Loop):
    loop.optimizer.zero_grad()
    info = loop.optimizer.backward(loop.losses())
    loop.optimizer.step()
    return info


def accumulating(loop: Loop):
    loop.optimizer.accumulate(loop.losses())
    loop.optimizer.accumulate(loop.losses())
    return loop.optimizer.step(loop.losses())


def scaled(loop: Loop):
    return loop.optimizer.step(loop.losses(), scaler=loop.scaler)


def scaled_in_three_calls(loop: Loop):
    loop.optimizer.zero_grad()
    info = loop.optimizer.backward(loop.losses(), loop.scaler)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    return info


def priority(mode: str, **options):
    return lambda inner, model: mtl.TaskPriorityOptimizer(inner, model, mode=mode, **options)


def of_closures(loop: Loop):
    def loss(task: str) -> Tensor:
        return (loop.model(loop.x, task) - TASKS.index(task)).square().mean()

    return loop.optimizer.step({task: lambda task=task: loss(task) for task in TASKS}, scaler=loop.scaler)


LOOPS = {
    **{name: (multi(name), whole) for name in REGISTRY},
    **{f"per {per}": (multi("mgda", per=per), whole) for per in ("tensor", "channel", "groups")},
    "gradvac per tensor": (multi("gradvac", per="tensor"), whole),
    "clipped": (multi(max_norm=0.1), whole),
    "drop_task": (multi("gradvac", on_nonfinite="drop_task"), whole),
    "loss.backward": (multi(gradients="backward"), whole),
    "backward": (multi(), backward_and_step),
    "accumulate": (multi("gradvac"), accumulating),
    "scaler": (multi("gradvac", max_norm=0.1), scaled, True),
    "scaler in three calls": (multi("gradvac"), scaled_in_three_calls, True),
    "master weights": (
        lambda inner, model: multi("gradvac")(mtl.MasterWeights(inner), model),
        whole,
        False,
        lambda: Net(width=4).to(torch.bfloat16),
    ),
    "flat": (flat(rho=0.1), of_a_function),
    "flat second": (flat(aggregation="second", adaptive=True), of_a_function),
    "flat samo": (flat(aggregation="direct", perturbation="samo"), of_a_function),
    "priority phase 1": (priority("phase1"), of_closures, False, task_net, (7, 2, 4, 4)),
    "priority phase 2": (priority("phase2", max_norm=0.1), of_closures, True, task_net, (7, 2, 4, 4)),
    "priority with a weighting": (priority("phase2", weighting="gradvac"), of_closures, False, task_net, (7, 2, 4, 4)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_replays_are_steps(name):
    """A batch that is not finite among them: whether a step is skipped is decided in the replay."""
    captured, eager = (Loop(*LOOPS[name]) for _ in range(2))
    results = []
    for loop in (captured, eager):
        torch.manual_seed(0)  # of random weightings, which draw on the device in each replay
        for step in range(2):  # warm-up: state is allocated
            loop.load(step)
            loop.step()
        addresses = {key: value.data_ptr() for key, value in loop.state().items()}
        capture = Capture()
        loop.load(2)
        with capture:
            loop.step()
        seen = []
        for step in range(3, 8):
            loop.load(step, bad=step == 5)
            if loop is captured:
                capture.replay()
            else:
                loop.step()
            seen.append(
                [getattr(loop.info, name).clone() for name in ("losses", "skipped", "weights") if hasattr(loop.info, name)]
            )
        assert {key: value.data_ptr() for key, value in loop.state().items()} == addresses
        results.append((seen, loop.state()))
    (actual, state), (expected, other) = results
    assert [bool(skipped.all()) for _, skipped, *_ in actual] == [step == 5 for step in range(3, 8)]
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
