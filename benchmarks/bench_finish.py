"""The fused finish on ResNet-50's shapes, against a combination and a step of torch's fused optimizer.

make bench ARGS="-k finish --tasks 3 --dtypes float32"

With K gradients, SGD with momentum moves K + 4 tensors' worth and AdamW K + 6; apart, the combination's K + 1 and the step's 5
and 7. Interleaved, as minima of what the thread took: the ratio is what counts on a busy machine.
"""

import time
from collections.abc import Callable

import pytest
import torch
from shapes import resnet50
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.finish import combine_adam_, combine_sgd_

ROUNDS = 25
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def bench_finish(benchmark, name: str, num_tasks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grads = [[torch.randn(shape).to(dtype) for shape in resnet50()] for _ in range(num_tasks)]
    weights, lr = torch.rand(num_tasks, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    out = [torch.empty_like(t) for t in grads[0]]
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in resnet50()]
    for param, grad in zip(params, out, strict=True):
        param.grad = grad.zero_()
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()
    own = [p.detach().clone() for p in params]

    def copies(key: str) -> list[Tensor]:
        return [optimizer.state[p][key].clone() for p in params]

    finish: Callable[[], object]
    if name == "sgd":
        momenta = copies("momentum_buffer")

        def finish() -> object:
            return combine_sgd_(own, momenta, grads, weights, lr, momentum=0.9)
    else:
        first, second, steps = copies("exp_avg"), copies("exp_avg_sq"), copies("step")

        def finish() -> object:
            torch._foreach_add_(steps, 1)
            return combine_adam_(own, first, second, [], steps, grads, weights, lr, weight_decay=0.01, decoupled=True)

    def combine() -> object:
        return mtl.combine(grads, weights, out)

    def read() -> list[Tensor]:
        return [t.amax() for row in grads for t in row]

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    calls = (finish, combine, optimizer.step, read)
    times = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
    fused, combination, step, reads = (min(row[i] for row in times) for i in range(len(calls)))
    apart = combination + step
    benchmark.extra_info.update(over_apart=round(fused / apart, 3))
    print(
        f"\n{name}, {num_tasks} tasks, {dtype}: {fused / apart:.2f} of combine and step; "
        f"{fused / reads:.2f} reads of the gradients against {combination / reads:.2f} + {step / reads:.2f}"
    )
    benchmark.pedantic(finish, rounds=1)
