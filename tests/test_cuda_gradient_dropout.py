"""The CUDA kernels of gradient dropout as the library launches them, run on the CPU from their PTX: the bits, and traffic.

That they give them for every layout and size is test_simulated_matrix.py's to show; a shard of it is here.
"""

import numpy as np
import ptxsim
import pytest
import torch
from device import FLOAT32, THREADS, address, compile_kernels, requires_nvcc, testing_module
from elementwise_ops import assert_moved_once
from helpers import DTYPES, LAYOUTS
from simulated import simulated_cuda
from test_gradient_dropout import MODES, SEED, SHAPES, assert_same_bits, expected, gradients, rate

import mtlkernels as mtl

pytestmark = requires_nvcc

CHUNK = 8192
modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_reference(dtype, mode):
    grads = gradients([*SHAPES, (CHUNK - 1,), (CHUNK + 5,)], dtype)
    grads[2] = None
    with simulated_cuda() as device:
        actual = mtl.gradient_dropout(grads, 0.3, mode, SEED)
    assert_same_bits(actual, expected(grads, 0.3, mode))
    assert len(device.launches) == 1


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_gradients_and_results_take_the_scalar_path(dtype, offset, mode):
    grads = gradients([(5,), (1000,), (CHUNK + 3,)], dtype)
    wanted = expected(grads, 0.3, mode)
    shifted = [torch.cat([t[:offset], t])[offset:] for t in grads]
    with simulated_cuda():
        assert_same_bits(mtl.gradient_dropout(shifted, 0.3, mode, SEED), wanted)
        out = [torch.zeros(t.numel() + offset, dtype=dtype)[offset:] for t in grads]
        assert_same_bits(mtl.gradient_dropout(grads, 0.3, mode, SEED, out=out), wanted)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "step_last", "flipped"])
def test_layouts(layout):
    grads = [LAYOUTS[layout](t) for t in gradients([(6, 4, 5, 3), (37, 67)])]
    wanted = expected([t.contiguous() for t in grads], 0.3, "gaussian")
    with simulated_cuda():
        assert_same_bits(mtl.gradient_dropout(grads, 0.3, "gaussian", SEED), wanted)
        mtl.gradient_dropout(grads, 0.3, "gaussian", SEED, out=grads)
    assert_same_bits(grads, wanted)


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, mode):
    grads = gradients([(CHUNK + 9,), (33,)], dtype)
    wanted = expected(grads, 0.3, mode)
    with simulated_cuda():
        mtl.gradient_dropout(grads, 0.3, mode, SEED, out=grads)
    assert_same_bits(grads, wanted)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, mode):
    (grad,), out = gradients([(4 * CHUNK,)], dtype), torch.empty(4 * CHUNK, dtype=dtype)
    with simulated_cuda() as device:
        mtl.gradient_dropout([grad], 0.3, mode, SEED, out=[out])
    assert_moved_once(device, [grad], out)


@modes
@pytest.mark.parametrize("p", [0.0, 1e-3, 0.5, 1 - 1e-9, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rates_stay_on_the_device(dtype, p, mode):
    """simulated_cuda refuses an op that the host waits for."""
    grads = gradients([(2000,)], dtype)
    with simulated_cuda():
        for own in (p, rate(p)):
            assert_same_bits(mtl.gradient_dropout(grads, own, mode, SEED), expected(grads, p, mode))


@modes
@pytest.mark.parametrize("p", [-0.1, 1.0, 7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rate_on_the_device_that_is_no_probability_makes_everything_nan(dtype, p, mode):
    grads = gradients([(100,), (CHUNK + 1,)], dtype)
    with simulated_cuda():
        assert all(t.isnan().all() for t in mtl.gradient_dropout(grads, rate(p), mode, SEED))


def test_any_schedule_gives_the_same_bits():
    grads = gradients([(3 * CHUNK + 5,), (77,)])
    for seed in (1, 2, 3):
        with simulated_cuda(seed=seed):
            assert_same_bits(mtl.gradient_dropout(grads, 0.3, "gaussian", SEED), expected(grads, 0.3, "gaussian"))


@modes
def test_derivatives_run_on_it(mode):
    """Forward, backward and once more backward are one launch each, and nothing else of a gradient's size is read."""
    leaf = gradients([(100,)], torch.float64)[0].requires_grad_()
    with simulated_cuda() as device:
        (result,) = mtl.gradient_dropout([leaf], 0.3, mode, SEED)
        (first,) = torch.autograd.grad((result**2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
    (factor,) = expected([torch.ones(100, dtype=torch.float64)], 0.3, mode)
    torch.testing.assert_close(first, 2 * factor**2 * leaf)
    torch.testing.assert_close(second, 2 * factor**2)
    assert len(device.launches) == 4  # the forward pass of the result, its backward pass, and the backward passes of both


def test_other_devices_are_refused():
    with simulated_cuda() as device:
        p = rate(0.3)
        device.place(p, -1)
        with pytest.raises(RuntimeError, match="p is not on the gradients' device"):
            torch.ops.mtlkernels.gradient_dropout([torch.ones(4)], p, "gaussian", SEED, [0])
        assert device.launches == []


# --- the kernel alone, as test_planted_faults.py runs it ---------------------------------------------------------------------

FLAGS = ("-fmad=false",)


def run_kernel(mode: str = "gaussian", flags: tuple[str, ...] = FLAGS, offset: int = 0) -> None:
    """One float32 tensor of more than a chunk, the sixth of a list, against the reference to the bit."""
    numel, place = CHUNK + 39, 5
    (grad,) = FLOAT32.random_row(np.random.default_rng(0), [numel], offset)
    out, p, seed = FLOAT32.empty(numel), ptxsim.empty(1, dtype=np.float64), ptxsim.empty(1, dtype=np.int64)
    p[...], seed[...] = 0.43, SEED.item()
    instance = f"gradient_dropout<float, {str(mode == 'gaussian').lower()}>"
    arguments = "const __grid_constant__ TensorTable, const double*, const int64_t*"
    module = compile_kernels("gradient_dropout.cuh", f"{instance}({arguments})", flags=flags)
    ((table, blocks),) = testing_module().plan([[address(grad), address(out), place]], [numel], 3)
    read = [grad, p, seed]
    module.launch(instance, blocks, THREADS, [table, p, seed], mem=[*read, out], outputs=[out], readonly=read)
    wanted = expected([None] * place + [torch.from_numpy(grad.copy())], 0.43, mode)[place]
    assert torch.from_numpy(out.copy()).equal(wanted)


@modes
@pytest.mark.parametrize("offset", [0, 1])
def test_kernel_alone(mode, offset):
    run_kernel(mode, offset=offset)
