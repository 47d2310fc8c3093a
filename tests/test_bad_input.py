"""What bad input gets: one exception type, a message that names the argument, the place and the fix, and nothing changed."""

import re
from collections.abc import Callable

import pytest
import torch
from helpers import assert_unchanged, random_gradients, snapshot
from torch import Tensor

import mtlkernels as mtl

SHAPES = [(4, 3), (5,)]
WEIGHTS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

CALLS: dict[str, Callable] = {
    "gram": mtl.gram,
    "gram_tensor": lambda grads: mtl.gram(grads, per="tensor"),
    "gram_channel": lambda grads: mtl.gram(grads, per="channel"),
    "cross_gram": lambda grads: mtl.gram(grads, random_gradients(2, SHAPES)),
    "combine": lambda grads: mtl.combine(grads, WEIGHTS),
    "combine_per_tensor": lambda grads: mtl.combine(grads, WEIGHTS.expand(2, 3)),
    "combine_out": lambda grads: mtl.combine(grads, WEIGHTS, out=[torch.zeros(4, 3), torch.zeros(5)]),
    "combine_in_place": lambda grads: mtl.combine(grads, WEIGHTS, out=grads[0]),
    "mix": lambda grads: mtl.mix(grads, torch.eye(3)),
    "project": mtl.project,
    "project_onto": lambda grads: mtl.project(grads, onto=1),
    "aggregate": lambda grads: mtl.aggregate(grads, "mean"),
}

BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "shape": (
        lambda g: g.new_zeros(7),
        r"task 2, tensor 1\) has shape \(7,\), grads\[0\]\[1\] has \(5,\); .*must have its shape",
    ),
    "transposed shape": (lambda g: g.new_zeros(1, 5), r"task 2, tensor 1\) has shape \(1, 5\).*must have its shape"),
    "dtype": (lambda g: g.double(), r"task 2, tensor 1\) is torch.float64, grads\[0\]\[1\] is torch.float32; cast "),
    "16-bit dtype": (lambda g: g.bfloat16(), r"task 2, tensor 1\) is torch.bfloat16, grads\[0\]\[1\] is torch.float32; cast "),
    "device": (lambda g: g.to("meta"), r"task 2, tensor 1\) is on meta, earlier tensors are on cpu; move "),
    "sparse": (lambda g: g.to_sparse(), r"is sparse .*; pass grads\[2\]\[1\]\.to_dense\(\)"),
    "complex": (lambda g: g.to(torch.complex64), r"is complex .*; pass torch\.view_as_real\(grads\[2\]\[1\]\)"),
    "integers": (lambda g: g.long(), r"is torch\.int64; task gradients are float32, bfloat16, float16, float64"),
    "booleans": (lambda g: g.bool(), r"is torch\.bool; task gradients are "),
    "float8": (lambda g: g.to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn; task gradients are "),
    "number": (lambda g: 1.0, r"is a float, not a tensor; pass None where task 2 has no gradient"),
    "list": (lambda g: g.tolist(), r"is a list, not a tensor; pass None where task 2 has no gradient"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradient(backend, case, call):
    spoil, message = BAD_GRADIENTS[case]
    grads = random_gradients(3, SHAPES)
    grads[2][1] = spoil(grads[2][1])
    before = snapshot(grads)
    with pytest.raises(ValueError, match=r"grads\[2\]\[1\].*" + message):
        CALLS[call](grads)
    assert_unchanged([pair for pair in before if pair[0].device.type == "cpu"])


@pytest.mark.parametrize("call", CALLS)
def test_several_devices(backend, call):
    grads = random_gradients(3, SHAPES)
    for row in grads:
        row[1] = row[1].to("meta")
    with pytest.raises(ValueError, match=r"grads\[0\]\[1\] \(task 0, tensor 1\) is on meta, earlier tensors are on cpu; move "):
        CALLS[call](grads)


@pytest.mark.parametrize("call", CALLS)
def test_ragged_lists(backend, call):
    grads = random_gradients(3, SHAPES)
    del grads[1][1]
    before = snapshot(grads)
    with pytest.raises(ValueError, match=r"grads\[1\] \(task 1\) lists 1 tensors, grads\[0\] lists 2; list every tensor"):
        CALLS[call](grads)
    assert_unchanged(before)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "combine_in_place"])
@pytest.mark.parametrize("grads", [3, None, [1.0, 2.0, 3.0], [None, None, None], torch.tensor(1.0)], ids=repr)
def test_not_sequences_of_tensors(backend, call, grads):
    with pytest.raises(ValueError, match=r"^grads is not K sequences of N tensors, K tensors, or one tensor \[K, \.\.\.\]"):
        CALLS[call](grads)


@pytest.mark.parametrize("per", ["row", "Model", None, 1])
def test_unknown_granularity(backend, per):
    with pytest.raises(ValueError, match=r'per is .*pass "model", "tensor" or "channel"'):
        mtl.gram(random_gradients(2, SHAPES), per=per)
    with pytest.raises((ValueError, RuntimeError, TypeError), match="per"):
        torch.ops.mtlkernels.gram([torch.ones(2)], 1, per)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda other: [row[:1] for row in other], r"other\[0\] lists 1 tensors, grads\[0\] lists 2; list every tensor"),
        (
            lambda other: [other[0], other[1][:1]],
            r"other\[1\] \(task 1\) lists 1 tensors, other\[0\] lists 2; list every tensor",
        ),
        (
            lambda other: [other[0], [other[1][0], torch.zeros(6)]],
            r"other\[1\]\[1\] .*has shape \(6,\), grads\[0\]\[1\] has \(5,\)",
        ),
        (lambda other: [other[0], [other[1][0], other[1][1].half()]], r"other\[1\]\[1\] .*is torch\.float16, .*; cast"),
        (lambda other: [[g.to("meta") for g in row] for row in other], r"other\[0\]\[0\] .*is on meta, .*; move"),
        (lambda other: 5, r"^other is not K sequences"),
    ],
    ids=["length", "ragged", "shape", "dtype", "device", "number"],
)
def test_other_that_does_not_fit(backend, spoil, message):
    grads, other = random_gradients(3, SHAPES), random_gradients(2, SHAPES, seed=1)
    with pytest.raises(ValueError, match=message):
        mtl.gram(grads, spoil(other))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"weights has shape \(2,\); 3 tasks and 2 tensors take \[3\] or \[2, 3\]"),
        (torch.ones(4), r"weights has shape \(4,\); .*\[3\] or \[2, 3\]"),
        (torch.ones(3, 2), r"weights has shape \(3, 2\); .*\[3\] or \[2, 3\]"),
        (torch.ones(1, 3), r"weights has shape \(1, 3\); .*\[3\] or \[2, 3\]"),
        (torch.ones(2, 3, 1), r"weights has shape \(2, 3, 1\)"),
        (torch.ones(()), r"weights has shape \(\)"),
        (
            torch.ones(3, dtype=torch.int64),
            r"weights is torch\.int64; pass a floating-point tensor, for example weights\.double\(\)",
        ),
        (torch.ones(2, 3, dtype=torch.int64), r"weights is torch\.int64; pass a floating-point tensor"),
        (torch.ones(3, dtype=torch.bool), r"weights is torch\.bool; pass a floating-point tensor"),
        (torch.ones(3, dtype=torch.complex64), r"weights is torch\.complex64; pass a floating-point tensor"),
        (torch.ones(3, device="meta"), r"weights is on meta, the gradients are on cpu; pass weights\.to\('cpu'\)"),
        ([0.5, 0.2, 0.3], r"weights is a list; pass a tensor"),
        (None, r"weights is a NoneType; pass a tensor"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(backend, weights, message):
    grads, out = random_gradients(3, SHAPES), random_gradients(1, SHAPES, seed=4)[0]
    before = snapshot([*grads, out])
    with pytest.raises(ValueError, match=message):
        mtl.combine(grads, weights)
    with pytest.raises(ValueError, match=message):
        mtl.combine(grads, weights, out=out)
    assert_unchanged(before)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (torch.ones(3), r"coefficients has shape \(3,\); 3 tasks take \[M, 3\]"),
        (torch.ones(3, 2), r"coefficients has shape \(3, 2\); 3 tasks take \[M, 3\]"),
        (torch.ones(2, 3, 3), r"coefficients has shape \(2, 3, 3\); 3 tasks take \[M, 3\]"),
        (torch.ones(2, 3, dtype=torch.int64), r"coefficients is torch\.int64; pass a floating-point tensor"),
        (torch.ones(2, 3, device="meta"), r"coefficients is on meta, the gradients are on cpu; pass coefficients\.to\('cpu'\)"),
        ([[1.0, 0.0, 0.0]], r"coefficients is a list; pass a tensor"),
    ],
    ids=["vector", "columns", "three dimensions", "integers", "device", "list"],
)
def test_coefficients_that_do_not_fit(backend, coefficients, message):
    with pytest.raises(ValueError, match=message):
        mtl.mix(random_gradients(3, SHAPES), coefficients)


def _same_twice() -> list[Tensor]:
    buffer = torch.zeros(4, 3)
    return [buffer, buffer]


def _shifted(step: int) -> list[Tensor]:
    flat = torch.zeros(40)
    return [flat[:12].view(4, 3), flat[step : step + 12].view(4, 3)]


BAD_BUFFERS: dict[str, tuple[Callable[[], list], str]] = {
    "too few": (lambda: [torch.zeros(4, 3)], r"out lists 1 tensors, grads list 2; pass one buffer per tensor"),
    "too many": (lambda: [torch.zeros(4, 3)] * 3, r"out lists 3 tensors, grads list 2; pass one buffer per tensor"),
    "none": (lambda: [torch.zeros(4, 3), None], r"out\[1\] is NoneType; tensor 1 has gradients and needs a buffer"),
    "shape": (lambda: [torch.zeros(4, 3), torch.zeros(3, 4)], r"out\[1\] is \(3, 4\) .*tensor 1 are \(4, 3\).*empty_like"),
    "broadcastable shape": (lambda: [torch.zeros(4, 3), torch.zeros(2, 4, 3)], r"out\[1\] is \(2, 4, 3\) .*empty_like"),
    "dtype": (
        lambda: [torch.zeros(4, 3), torch.zeros(4, 3).double()],
        r"out\[1\] is .*torch\.float64.*torch\.float32.*empty_like",
    ),
    "device": (lambda: [torch.zeros(4, 3), torch.zeros(4, 3, device="meta")], r"out\[1\] is .*on meta, .*on cpu; .*empty_like"),
    "same twice": (_same_twice, r"out\[1\] shares memory with out\[0\]; pass distinct, dense buffers"),
    "views of the same": (lambda: _shifted(0), r"out\[1\] shares memory with out\[0\]; pass distinct"),
    "partial overlap": (lambda: _shifted(5), r"out\[1\] shares memory with out\[0\]; pass distinct"),
    "expanded": (lambda: [torch.zeros(4, 3), torch.zeros(1, 3).expand(4, 3)], r"out\[1\] shares memory with itself; pass"),
    "windows": (
        lambda: [torch.zeros(4, 3), torch.zeros(12).as_strided((4, 3), (2, 1))],
        r"out\[1\] shares memory with itself; pass",
    ),
    "negated": (lambda: [torch.zeros(4, 3), torch._neg_view(torch.zeros(4, 3))], r"out.* negated.*; pass out\[n\]\.clone\(\)"),
}


@pytest.mark.parametrize("case", BAD_BUFFERS)
def test_buffers_that_do_not_fit(backend, case):
    make, message = BAD_BUFFERS[case]
    grads, out = random_gradients(3, [(4, 3), (4, 3)]), make()
    before = snapshot([*grads, [b for b in out if b is None or b.device.type == "cpu"]])
    with pytest.raises(ValueError, match=message):
        mtl.combine(grads, WEIGHTS, out=out)
    assert_unchanged(before)


def test_a_bad_gradient_leaves_the_buffers_alone(backend):
    for n in range(2):
        for spoil, _ in BAD_GRADIENTS.values():
            grads, out = random_gradients(3, [(5,), (5,)]), [torch.full((5,), 3.0), torch.full((5,), 4.0)]
            grads[2][n] = spoil(grads[2][n])
            before = snapshot([out])
            with pytest.raises(ValueError, match=re.escape(f"grads[2][{n}]")):
                mtl.combine(grads, WEIGHTS, out=out)
            assert_unchanged(before)


@pytest.mark.parametrize("onto", [3, -4, 100])
def test_onto_out_of_range(backend, onto):
    with pytest.raises(ValueError, match=rf"onto is {onto}; 3 tasks take an index from -3 to 2, or N tensors"):
        mtl.project(random_gradients(3, SHAPES), onto=onto)


@pytest.mark.parametrize(
    ("onto", "message"),
    [
        ([torch.zeros(4, 3)], r"onto lists 1 tensors, grads\[0\] lists 2; list every tensor"),
        ([torch.zeros(4, 3), torch.zeros(6)], r"onto\[1\] .*has shape \(6,\), grads\[0\]\[1\] has \(5,\)"),
        ([torch.zeros(4, 3), torch.zeros(5).half()], r"onto\[1\] .*is torch\.float16, .*; cast"),
        ([torch.zeros(4, 3), 0.0], r"onto\[1\] is a float, not a tensor"),
        (1.5, r"onto is 1\.5; .*index.*or N tensors"),
    ],
    ids=["length", "shape", "dtype", "number in list", "number"],
)
def test_onto_that_does_not_fit(backend, onto, message):
    with pytest.raises(ValueError, match=message):
        mtl.project(random_gradients(3, SHAPES), onto=onto)


@pytest.mark.parametrize("function", [mtl.cosine, mtl.magnitude_similarity, mtl.conflict_rate, mtl.condition_number])
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(3), r"gram has shape \(3,\); pass \[\.\.\., K, K\]"),
        (torch.ones(2, 3), r"gram has shape \(2, 3\); pass \[\.\.\., K, K\]"),
        (torch.ones(2, 2, dtype=torch.int64), r"gram is torch\.int64; pass float64"),
        (torch.ones(2, 2, dtype=torch.bfloat16), r"gram is torch\.bfloat16; pass float64"),
        ([[1.0]], r"gram is a list; pass"),
    ],
    ids=["vector", "rectangle", "integers", "bfloat16", "list"],
)
def test_not_a_gram(backend, function, gram, message):
    with pytest.raises(ValueError, match=message):
        function(gram)


# The ops themselves (torch.ops.mtlkernels) are memory safe whatever they are given: an exception, never a result.

ONES = torch.ones(4)
OP_CALLS = {
    "rows are no multiple of the tasks": lambda op: op.gram([ONES] * 3, 2, "model"),
    "no tasks but gradients": lambda op: op.gram([ONES], 0, "model"),
    "negative tasks": lambda op: op.gram([ONES], -1, "model"),
    "shapes differ": lambda op: op.gram([ONES, torch.ones(3)], 2, "model"),
    "cross shapes differ": lambda op: op.cross_gram([ONES], [torch.ones(3)], 1, 1, "model"),
    "cross numbers of tensors differ": lambda op: op.cross_gram([ONES], [ONES, ONES], 1, 1, "model"),
    "weights of another length": lambda op: op.combine([ONES] * 3, torch.ones(2)),
    "weights for other tensors": lambda op: op.combine([ONES] * 4, torch.ones(3, 2)),
    "weights without dimensions": lambda op: op.combine([ONES], torch.ones(())),
    "column of none": lambda op: op.combine([None, None], torch.ones(2)),
    "mixed column of none": lambda op: op.mix([None, None], torch.ones(1, 2)),
    "buffers missing": lambda op: op.combine_([], [ONES, ONES], torch.ones(2)),
    "buffers too many": lambda op: op.combine_([ONES.clone(), ONES.clone()], [ONES, ONES], torch.ones(2)),
    "buffer of another shape": lambda op: op.combine_([torch.ones(2)], [ONES, ONES], torch.ones(2)),
    "coefficients without columns": lambda op: op.mix([ONES, ONES], torch.ones(2)),
    "coefficients of another width": lambda op: op.mix([ONES] * 3, torch.ones(2, 2)),
    "integer weights": lambda op: op.combine([ONES], torch.ones(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", OP_CALLS)
def test_ops_refuse_what_they_cannot_do(backend, case):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        OP_CALLS[case](torch.ops.mtlkernels)
    assert torch.equal(ONES, torch.ones(4))
