"""The CPU kernels of combine_sgd_ and combine_adam_: the bits of combine and torch.optim, for any threads and places."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import CHUNK, LAYOUTS, drop, random_gradients
from test_finish import ADAM, CASES, FEW, Twin, names, positive, torch_optimizer

import mtlkernels as mtl
from mtlkernels.dispatch import CAPABILITIES, cpu_capability, use_backend

SHAPES = [(3, 5), (), (257,), (0, 4), (6, 4, 5, 3), (1001,), (2049,), (CHUNK + 7,)]


@pytest.fixture(autouse=True)
def compiled(cpu_library):
    with use_backend("cpp"):
        yield


def same_step(decoupled, options, dtype, num_tasks, shapes=SHAPES, layout=lambda t: t.clone()) -> None:
    """Two steps of the kernel, and of combine and torch.optim: equal to the bit but for a root of torch's own (MKL's)."""
    (start,) = random_gradients(1, shapes, dtype, seed=9)
    ours = Twin([layout(t) for t in start], decoupled, **options)
    theirs = [t.clone().requires_grad_() for t in ours.params]
    optimizer = torch_optimizer(theirs, decoupled, **options)
    weights = positive(num_tasks)
    for step in range(2):
        grads = drop(random_gradients(num_tasks, shapes, dtype, seed=step), (0, 2))
        for param, grad in zip(theirs, mtl.combine(grads, weights), strict=True):
            param.grad = grad
        optimizer.step()
        ours.step(grads, weights)
    keys = ["momentum_buffer"] if decoupled is None else ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    for n, (p, q) in enumerate(zip(ours.params, theirs, strict=True)):
        for key, kept in zip(keys, ours.states, strict=False):
            # From the second step on an undecoupled decay brings the parameters' last bits into the states.
            tolerance = 0 if decoupled is not False or not options["weight_decay"] else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(kept[n], optimizer.state[q][key], rtol=tolerance, atol=tolerance)
        tolerance = 0 if decoupled is None else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(p, q.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("decoupled", "options"), CASES, ids=names)
def test_bits_of_combine_and_torch_optim(decoupled, options, dtype):
    same_step(decoupled, options, dtype, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 4, 5, 6, 7, 8, 9, 17])
def test_bits_with_any_number_of_tasks(num_tasks, dtype):
    for decoupled, options in ((None, CASES[5][1]), (True, ADAM[4])):
        same_step(decoupled, options, dtype, num_tasks)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "step_last", "window"])
def test_bits_in_any_layout(layout):
    for decoupled, options in ((None, CASES[5][1]), (True, ADAM[4])):
        same_step(decoupled, options, torch.float32, 3, [(37, 67), (6, 4, 5, 3), (70, 70)], LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_an_element_is_computed_alike_wherever_it_lies(decoupled, options, dtype):
    """In a vector, in a tail and gathered: the bits of a long row are those of its elements one by one."""
    grads = random_gradients(3, [(37,)], dtype)
    whole, single = Twin([torch.zeros(37, dtype=dtype)], decoupled, **options), []
    whole.step(grads, positive(3))
    for e in range(37):
        single.append(Twin([torch.zeros(1, dtype=dtype)], decoupled, **options))
        single[-1].step([[row[0][e : e + 1]] for row in grads], positive(3))
    spread = Twin([LAYOUTS["step_last"](torch.zeros(1, 37, dtype=dtype))], decoupled, **options)
    spread.step([[row[0].view(1, -1)] for row in grads], positive(3))
    for n, tensor in enumerate(whole.tensors()):
        assert torch.equal(tensor, torch.cat([own.tensors()[n] for own in single]))
        assert torch.equal(tensor, spread.tensors()[n].view(-1))


def test_the_same_bits_for_any_threads():
    grads, results = random_gradients(3, [(3 * CHUNK + 5,), (77,)]), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        twin = Twin(random_gradients(1, [(3 * CHUNK + 5,), (77,)], seed=9)[0], True, **ADAM[4])
        twin.step(grads, positive(3))
        results.append(twin.tensors())
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_reaches_the_largest_second_moment():
    twin = Twin([torch.zeros(40)], True, **ADAM[6])
    twin.states[2][0][3] = torch.nan
    grad = torch.ones(40)
    grad[7] = torch.nan
    twin.step([[grad]], positive(1))
    assert twin.states[2][0].isnan().nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_other_instruction_sets(capability):
    """In a process of its own, with torch's kernels for the same instruction set."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    if capability == cpu_capability():
        pytest.skip("every other test runs it")
    own = {
        "MTLKERNELS_CPU_CAPABILITY": capability,
        "ATEN_CPU_CAPABILITY": {"baseline": "default", "avx512_bf16": "avx512"}.get(capability, capability),
    }
    tests = "test_bits_of_combine_and_torch_optim or test_an_element or test_bits_in_any"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    ran = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
