"""The Triton kernel of gradient dropout, run on the CPU from its PTX with its plan's launches: the bits, and traffic."""

import pytest
import torch
from helpers import DTYPES
from test_gradient_dropout import MODES, SEED, assert_same_bits, expected, gradients, noise, rate
from torch import Tensor
from triton_device import conflicts, misaligned, run

from mtlkernels.random import philox
from mtlkernels.triton import gradient_dropout, launch

SMALL = [(1,), (7,), (33, 5), (), (255,)]
modes = pytest.mark.parametrize("mode", MODES)


def run_dropout(grads: list[Tensor], p: float, mode: str, out: list[Tensor] | None = None, **options) -> list[Tensor]:
    """The results; the launches' reports are in ``run_dropout.reports``."""
    columns = [[grad.contiguous()] for grad in grads]
    results = out or [torch.empty_like(column[0]) for column in columns]
    launches = gradient_dropout.plan(columns, results, gradient_dropout.Dropout(rate(p), mode, SEED, range(len(columns))))
    run_dropout.reports = run(launches, columns, results, **options)
    return results


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_reference(dtype, mode):
    grads = gradients([*SMALL, (gradient_dropout.CHUNK - 1,), (gradient_dropout.CHUNK + 1,)], dtype)
    assert_same_bits(run_dropout(grads, 0.3, mode), expected(grads, 0.3, mode))


@modes
@pytest.mark.parametrize("p", [0.0, 1e-3, 1 - 1e-9, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rates(dtype, p, mode):
    grads = gradients([(300,)], dtype)
    assert_same_bits(run_dropout(grads, p, mode), expected(grads, p, mode))


@modes
@pytest.mark.parametrize("p", [-0.1, 1.0, 7.0, torch.nan, torch.inf])
def test_a_rate_that_is_no_probability_makes_everything_nan(p, mode):
    for dtype in (torch.float32, torch.float64):
        assert run_dropout(gradients([(300,)], dtype), p, mode)[0].isnan().all()


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_gradients_and_results(dtype, offset, mode):
    grads = gradients([(5,), (5001,)], dtype)
    wanted = expected(grads, 0.3, mode)
    assert_same_bits(run_dropout([misaligned(t, offset) for t in grads], 0.3, mode), wanted)
    assert_same_bits(run_dropout(grads, 0.3, mode, out=[misaligned(torch.zeros_like(t), offset) for t in grads]), wanted)


def test_in_place():
    grads = gradients([(9001,), (33,)])
    wanted = expected(grads, 0.3, "gaussian")
    assert_same_bits(run_dropout(grads, 0.3, "gaussian", out=grads), wanted)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, mode):
    (grad,) = gradients([(2 * gradient_dropout.CHUNK,)], dtype)
    (out,) = run_dropout([grad], 0.3, mode)
    (report,) = run_dropout.reports
    assert (report.alloc(grad).load_bytes, report.alloc(grad).load_sectors) == (grad.nbytes, grad.nbytes // 32)
    assert (report.alloc(out).store_bytes, report.alloc(out).store_sectors) == (out.nbytes, out.nbytes // 32)
    assert conflicts(report) <= 0.3  # the four words of a counter change places through shared memory


def test_any_schedule_gives_the_same_bits():
    grads = gradients([(5003,), (77,)])
    for seed in (1, 2):
        assert_same_bits(run_dropout(grads, 0.3, "gaussian", seed=seed), expected(grads, 0.3, "gaussian"))


@modes
def test_elements_past_2_to_the_34(monkeypatch, mode):
    """The last chunk of a tensor whose counters' upper words are not 0; its addresses count back from memory that is there."""
    (grad,), out = gradients([(4099,)]), torch.zeros(4099)
    constants, options = gradient_dropout.meta(torch.float32, mode == "gaussian")
    length, begin = 8192, 2**34 + 8192
    back = [t.data_ptr() - 4 * begin for t in (grad, out)]
    values, _ = launch.table_of([launch.Work(begin + 4099, length, 5, back)])
    values[:2] = [-begin // length, 1]  # the first block is the tensor's last chunk
    arguments = (torch.tensor(values), rate(0.3), SEED, 1)
    run([launch.Launch(gradient_dropout.gradient_dropout_chunks, 1, arguments, constants, options)], [[grad]], [out])

    def words(seed: Tensor, place: int, numel: int) -> Tensor:
        block = begin // 4 + torch.arange(1025)
        key = torch.stack([SEED[0] & 0xFFFFFFFF, (SEED[0] >> 32) & 0xFFFFFFFF])
        return philox(torch.stack([block & 0xFFFFFFFF, block >> 32, 0 * block + 5, 0 * block], -1), key).flatten()[:numel]

    monkeypatch.setattr("mtlkernels.random.element_words", words)
    monkeypatch.setitem(noise.__globals__, "element_words", words)
    assert out.equal(grad * noise(rate(0.3), mode, SEED, 5, 4099, torch.float32))
