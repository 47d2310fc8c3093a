"""The Triton kernel of combine_sgd_ and combine_adam_, run on the CPU from its PTX with its plan's launches."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers import DTYPES, drop, random_gradients
from test_finish import ADAM, FEW, SGD, Twin, check, names, positive
from triton_device import misaligned, module

from mtlkernels._library import NAMESPACE
from mtlkernels.triton import combine, finish
from mtlkernels.triton.launch import Launch

BOTH = [(None, SGD[3]), (True, ADAM[4])]


@contextmanager
def simulated_triton(monkeypatch):
    """The ops on CPU tensors by the Triton backend, its launches run in ptxsim; yields their reports."""
    reports, memory = [], []

    def launch(self) -> None:
        tables = [t for t in self.arguments if isinstance(t, torch.Tensor)]
        reports.append(
            module(self).launch(None, self.blocks, None, list(self.arguments), mem=[*memory, *tables], readonly=tables)
        )

    def planned(columns, moved, steps, *others):
        memory[:] = [t for own in [*columns, *moved] for t in own if t is not None and t.numel()] + list(steps)
        return plan(columns, moved, steps, *others)

    plan = finish.plan
    monkeypatch.setattr(finish, "plan", planned)
    monkeypatch.setattr(Launch, "__call__", launch)
    override = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch tells of every override
            for op in ("combine_sgd_", "combine_adam_"):
                override.impl(op, getattr(finish, op), "CPU", allow_override=True)
        yield reports
    finally:
        override._destroy()


@pytest.fixture
def reports(monkeypatch):
    with simulated_triton(monkeypatch) as reports:
        yield reports


@pytest.mark.parametrize("num_tasks", [1, 3, 7, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_at_tails_and_chunks(reports, dtype, num_tasks):
    constants, _ = finish.meta(num_tasks, dtype, True)
    numel = combine.chunk_length(constants, dtype) + 9
    grads = random_gradients(num_tasks, [(1,), (33, 5), (0, 4), (numel,)], dtype)
    for decoupled, options in BOTH:
        check(grads, positive(num_tasks), decoupled, options, steps=1)
    assert len(reports) == 2


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_options(reports, decoupled, options):
    check(random_gradients(3, [(40,), (5, 3)]), positive(3, 2), decoupled, options)
    assert len(reports) == 2


def test_absent_misaligned_and_spread_rows(reports):
    grads = drop(random_gradients(3, [(5001,), (100,), (20, 3)]), (1, 1), (0, 2))
    grads[2][0] = misaligned(grads[2][0], 1)
    grads[2][2] = grads[2][2].t().contiguous().t()
    for decoupled, options in BOTH:
        check(grads, positive(3), decoupled, options, steps=1)
        check(grads, positive(3), decoupled, options, steps=1, layout="misaligned")


@pytest.mark.parametrize("factor", [1e-35, 1e32])
def test_weights_outside_float32(reports, factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(100,)])]
    for decoupled, options in BOTH:
        check(grads, torch.tensor([factor, 3 * factor], dtype=torch.float64), decoupled, options, steps=1)


def test_a_skipped_step_writes_nothing(reports):
    for decoupled, options in FEW:
        twin = Twin([torch.ones(300)], decoupled, **options)
        before = [t.clone() for t in twin.tensors()]
        twin.step(random_gradients(1, [(300,)]), positive(1), torch.tensor(True))
        torch.testing.assert_close(twin.tensors(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_and_written_once(reports, dtype):
    for decoupled, options in ((None, SGD[3]), (True, ADAM[6])):
        constants, _ = finish.meta(3, dtype, decoupled is not None)
        grads = random_gradients(3, [(2 * constants["E"],)], dtype)
        twin = Twin([torch.zeros_like(grads[0][0])], decoupled, **options)
        twin.calls += decoupled is None
        twin.step(grads, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
        for tensor in twin.tensors():
            assert reports[-1].alloc(tensor).load_bytes == reports[-1].alloc(tensor).store_bytes == tensor.nbytes
        assert [reports[-1].alloc(row[0]).load_bytes // row[0].nbytes for row in grads] == [1, 0, 1]
