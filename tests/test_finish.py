"""combine_sgd_ and combine_adam_: torch.optim to the bit on the reference, float64 within rounding on every backend."""

import itertools
import math

import pytest
import torch
from helpers import CHUNK, DTYPES, EXPANDED, LAYOUTS, UNIT_ROUNDOFF, drop, random_gradients
from torch import Tensor

from mtlkernels.dispatch import use_backend
from mtlkernels.finish import combine_adam_, combine_sgd_

OPS = torch.ops.mtlkernels
SHAPES = [(3, 5), (), (257,), (0, 4), (6, 4, 5, 3), (1001,)]

SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.2, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
]
ADAM = [
    {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    for (betas, eps), decay, amsgrad, maximize in itertools.product(
        [((0.9, 0.999), 1e-8), ((0.3, 0.45), 1e-3)], (0.0, 0.1), (False, True), (False, True)
    )
]


class Twin:
    """Parameters and state of an op, in the layouts of the parameters."""

    def __init__(self, params: list[Tensor], decoupled: bool | None, lr: float, **options) -> None:
        self.params = params
        self.decoupled, self.options = decoupled, options
        self.lr = torch.tensor(lr, dtype=torch.float64)
        betas = self.options.pop("betas", (0.9, 0.999))
        if decoupled is None:
            count = int(options.get("momentum", 0) != 0)
        else:
            count = 3 if options.get("amsgrad") else 2
            self.options |= {"beta1": betas[0], "beta2": betas[1], "decoupled": decoupled}
        # What the first step of an SGD overwrites is NaN.
        fill = math.nan if decoupled is None else 0.0
        self.states = [[torch.full_like(p, fill) for p in params] for _ in range(count)]
        self.calls = 0

    def step(self, grads: list[list[Tensor | None]], weights: Tensor, skip: Tensor | None = None) -> None:
        taken = skip is None or not skip
        if self.decoupled is None:
            momenta = self.states[0] if self.states else []
            combine_sgd_(self.params, momenta, grads, weights, self.lr, skip, first=self.calls == 0, **self.options)
        else:
            states = self.states if len(self.states) == 3 else [*self.states, []]
            steps = [torch.tensor(float(self.calls + taken)) for _ in self.params]
            combine_adam_(self.params, *states, steps, grads, weights, self.lr, skip, **self.options)
        self.calls += taken

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(t for kept in self.states for t in kept)]

    def copy(self, change=lambda t: t.clone()) -> "Twin":
        other = object.__new__(Twin)
        other.__dict__ = dict(self.__dict__)
        other.params, other.states = [change(p) for p in self.params], [[change(t) for t in kept] for kept in self.states]
        return other


def torch_optimizer(params: list[Tensor], decoupled: bool | None, **options) -> torch.optim.Optimizer:
    if decoupled is None:
        return torch.optim.SGD(params, foreach=False, **options)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(params, foreach=False, **options)


CASES = [(None, options) for options in SGD] + [(decoupled, options) for decoupled in (False, True) for options in ADAM]
FEW = [
    *((None, SGD[n]) for n in (1, 3, 5)),
    (True, ADAM[4]),
    (False, ADAM[6]),
    (True, ADAM[11]),
]


def names(value) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items() if k != "lr" and v)
    return {None: "sgd", True: "adamw", False: "adam"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("decoupled", "options"), CASES, ids=names)
def test_reference_is_torch_optim_to_the_bit(decoupled, options, dtype):
    (start,) = random_gradients(1, SHAPES, dtype)
    start[4] = start[4].to(memory_format=torch.channels_last)
    theirs = [t.clone().requires_grad_() for t in start]
    optimizer = torch_optimizer(theirs, decoupled, **options)
    ours = Twin([t.clone() for t in start], decoupled, **options)
    one = torch.ones(1, dtype=torch.float64)
    with use_backend("reference"):
        for step in range(4):
            (grads,) = random_gradients(1, SHAPES, dtype, seed=step + 1)
            for param, grad in zip(theirs, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
            ours.step([grads], one, [None, torch.tensor(False)][step % 2])
    keys = ["momentum_buffer"] if decoupled is None else ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert all(torch.equal(p, q) for p, q in zip(ours.params, theirs, strict=True))
    for key, kept in zip(keys, ours.states, strict=False):
        assert all(torch.equal(t, optimizer.state[p][key]) for t, p in zip(kept, theirs, strict=True)), key


# --- every backend against float64 --------------------------------------------------------------------------------------------


def bounds(before: Twin, after: Twin, grads, weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """How far each of ``after.tensors()`` may be from its float64 value, given both in float64.

    Of the gradient, (K + 2) u of the sum of |w g|; with it come a few roundings more, c u of every term that is added. Adam's
    quotient m / d carries the errors of m and of d, and v twice that of the gradient. At last each is rounded to the dtype.
    """
    unit, c = (2.0**-53 if dtype == torch.float64 else 2.0**-24), 8.0
    table = weights.expand(len(before.params), len(grads))
    result = []
    for n, (p, q) in enumerate(zip(before.params, after.params, strict=True)):
        terms = [table[n, k].abs() * row[n].double().abs() for k, row in enumerate(grads) if row[n] is not None]
        decay = before.options.get("weight_decay", 0.0) * p.abs() * (0 if before.decoupled else 1)
        size = sum(terms) + decay
        wrong = (len(grads) + c) * unit * size
        lr = float(before.lr)
        if before.decoupled is None:
            kept = [s[n] for s in before.states if not s[n].isnan().any()]
            m = wrong + c * unit * sum((before.options["momentum"] * t.abs() for t in kept), size)
            result.append((lr * 2 * m + c * unit * (p.abs() + 2 * lr * size), [m for _ in before.states]))
            continue
        beta1, beta2 = before.options["beta1"], before.options["beta2"]
        m, v = before.states[0][n], before.states[1][n]
        wrong_m = wrong + c * unit * (m.abs() + size)
        wrong_v = 2 * (1 - beta2) * size * wrong + c * unit * (v.abs() + size**2)
        u, step = after.states[-1][n], after.calls
        root = u.sqrt() / math.sqrt(1 - beta2**step)
        d = root + before.options["eps"]
        wrong_d = wrong_v / (2 * u.sqrt()).clamp(min=1e-300) / math.sqrt(1 - beta2**step) + c * unit * d
        rate = lr / (1 - beta1**step)
        moved = rate * (wrong_m / d + after.states[0][n].abs() * wrong_d / d**2)
        result.append((moved + c * unit * (p.abs() + q.abs()), [wrong_m, *[wrong_v] * (len(before.states) - 1)]))
    columns = [[p for p, _ in result], *([s[i] for _, s in result] for i in range(len(before.states)))]
    own = UNIT_ROUNDOFF[dtype]
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    flat = [b for column in columns for b in column]
    return [b * (1 + own) + own * t.abs() + subnormal for b, t in zip(flat, after.tensors(), strict=True)]


def check(grads, weights: Tensor, decoupled: bool | None, options: dict, steps: int = 2, layout="contiguous") -> None:
    """Steps with the backend, each beside the same step of the reference in float64 from the same values."""
    model = [next(t for t in column if t is not None) for column in zip(*grads, strict=True)]
    dtype = model[0].dtype
    (start,) = random_gradients(1, [t.shape for t in model], dtype, seed=9)
    twin = Twin([LAYOUTS[layout](t) for t in start], decoupled, **options)
    for _ in range(steps):
        wide = twin.copy(torch.Tensor.double)
        before = twin.copy(torch.Tensor.double)
        with use_backend("reference"):
            wide.step([[None if t is None else t.double() for t in row] for row in grads], weights)
        twin.step(grads, weights)
        for actual, expected, bound in zip(
            twin.tensors(), wide.tensors(), bounds(before, wide, grads, weights, dtype), strict=True
        ):
            error = (actual.double() - expected).abs()
            assert (error <= bound).all(), (
                f"error {float(error.max()):.2e}, bound there {float(bound[error > bound].min()):.2e}"
            )


def positive(num_tasks: int, num_tensors: int | None = None) -> Tensor:
    shape = (num_tasks,) if num_tensors is None else (num_tensors, num_tasks)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 17, 64])
@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_matches_float64(backend, decoupled, options, num_tasks, dtype):
    grads = random_gradients(num_tasks, [(3, 5), (), (0, 4), (300,)], dtype)
    check(grads, positive(num_tasks), decoupled, options)
    check(grads, positive(num_tasks, 4), decoupled, options, steps=1)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 15, 17, 63, 65, 8191, 8192, 8193, CHUNK - 1, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decoupled", [None, True], ids=names)
def test_sizes_around_vectors_blocks_and_chunks(backend, decoupled, dtype, numel):
    options = SGD[3] if decoupled is None else ADAM[2]
    check(random_gradients(2, [(numel,), (3,)], dtype), positive(2), decoupled, options, steps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["gradients", "parameters and states", "all"])
@pytest.mark.parametrize("decoupled", [None, False], ids=names)
def test_layouts(backend, decoupled, of, layout):
    if layout in EXPANDED and of != "gradients":
        pytest.skip("nothing can be written there")
    grads = random_gradients(2, [(37, 67), (6, 4, 5, 3)], torch.bfloat16)
    options = SGD[3] if decoupled is None else ADAM[2]
    if of != "parameters and states":
        grads = [[LAYOUTS[layout](t) for t in row] for row in grads]
    check(grads, positive(2), decoupled, options, steps=1, layout="contiguous" if of == "gradients" else layout)


def test_absent_gradients_count_as_zero(backend):
    grads = drop(random_gradients(4, [(300,), (20, 3)]), (0, 0), (3, 1), (2, 1))
    for decoupled, options in FEW:
        check(grads, positive(4), decoupled, options)


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_what_has_weight_zero_is_not_read(backend, decoupled, options):
    grads = random_gradients(3, [(100,), (7,)])
    spoilt = [grads[0], [torch.full_like(t, math.nan) for t in grads[1]], grads[2]]
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    results = []
    for rows in (spoilt, drop(grads, (1, 0), (1, 1))):
        twin = Twin([t.clone() for t in random_gradients(1, [(100,), (7,)], seed=4)[0]], decoupled, **options)
        twin.step(rows, weights)
        results.append(twin.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_a_skipped_step_writes_nothing(backend, decoupled, options):
    """Whatever the weights and gradients are, and in the first step, too."""
    shapes = [(3, 5), (1001,), ()]
    twin = Twin([t.clone() for t in random_gradients(1, shapes, seed=4)[0]], decoupled, **options)
    grads = [[torch.full(shape, math.inf) for shape in shapes]]
    nan = torch.full((1,), math.nan, dtype=torch.float64)
    for _ in range(2):
        before = [t.clone() for t in twin.tensors()]
        twin.step(grads, nan, torch.tensor(True))
        torch.testing.assert_close(twin.tensors(), before, rtol=0, atol=0, equal_nan=True)
        twin.step(random_gradients(1, shapes), torch.ones(1, dtype=torch.float64), torch.tensor(False))
    assert all(t.isfinite().all() for t in twin.tensors())


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_gradients_may_lie_in_what_is_written(backend, decoupled, options):
    """As those of <p, q> do: they are what they were before the call."""
    (start,) = random_gradients(1, [(40, 3), (40, 3)])
    shared, apart = (Twin([t.clone() for t in start], decoupled, **options) for _ in range(2))
    p, q = shared.params
    shared.step([[q, p], [p, None]], positive(2))
    p, q = (t.clone() for t in start)
    apart.step([[q, p], [p, None]], positive(2))
    assert all(torch.equal(a, b) for a, b in zip(shared.tensors(), apart.tensors(), strict=True))


def test_dtypes_may_differ_between_tensors(backend):
    rows = [random_gradients(2, [(33,), (4, 3)], dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    for decoupled, options in FEW:
        mixed = Twin([t.clone() for own in rows for t in own[0]], decoupled, **options)
        mixed.step([[t for own in rows for t in own[k]] for k in range(2)], positive(2))
        alone = []
        for own in rows:
            twin = Twin([t.clone() for t in own[0]], decoupled, **options)
            twin.step(own, positive(2))
            alone.append(twin)
        assert all(torch.equal(a, b) for a, b in zip(mixed.params, [p for t in alone for p in t.params], strict=True))


def test_saved_tensors_notice_the_step(backend):
    for decoupled, options in FEW:
        twin = Twin([torch.ones(3)], decoupled, **options)
        x = torch.ones(3, requires_grad=True)
        product = (x * twin.params[0]).sum()
        twin.step([[torch.ones(3)]], torch.ones(1, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_nothing_to_do(backend):
    lr, weights = torch.tensor(0.1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    combine_sgd_([], [], [[], []], weights, lr, momentum=0.9)
    combine_adam_([], [], [], [], [], [[], []], weights, lr)


# --- bad input ----------------------------------------------------------------------------------------------------------------

BAD = {
    "tasks": ({"weights": torch.ones(3, dtype=torch.float64)}, r"grads lists 4 tensors; 3 tasks of 2 take 6"),
    "no weights": ({"weights": torch.ones((), dtype=torch.float64)}, r"weights has shape \(\)"),
    "integer weights": ({"weights": torch.ones(2, dtype=torch.int64)}, r"weights is torch.int64; pass a floating-point"),
    "gradient's shape": ({(1, 1): torch.ones(6)}, r"grads\[1\]\[1\] .*has shape \(6,\), params\[1\] has \(5,\)"),
    "gradient's dtype": ({(1, 1): torch.ones(5).half()}, r"grads\[1\]\[1\] .*is torch.float16, params\[1\] is torch.float32"),
    "gradient's device": ({(1, 1): torch.ones(5, device="meta")}, r"grads\[1\]\[1\] .*is on meta"),
    "sparse": ({(1, 1): torch.ones(5).to_sparse()}, r"grads\[1\]\[1\] is sparse"),
    "no gradient": ({(0, 1): None, (1, 1): None}, r"grads has no gradient of tensor 1; leave the tensor out"),
    "state's length": ({"state": lambda s: s[:1]}, r"lists 1 tensors, params 2; pass one for each"),
    "state's shape": ({"state": lambda s: [s[0], torch.ones(6)]}, r"\[1\] .*has shape \(6,\), params\[1\] has \(5,\)"),
    "state's dtype": ({"state": lambda s: [s[0], s[1].double()]}, r"\[1\] .*is torch.float64, params\[1\] is torch.float32"),
    "shared memory": ({"state": lambda s: [s[0], s[0].view(-1)[:5]]}, r"shares memory with out\[\d\]"),
    "lr's dtype": ({"lr": torch.tensor(0.1)}, r"lr is torch.float32 of shape \(\); pass a scalar tensor of torch.float64"),
    "lr's shape": ({"lr": torch.ones(1, dtype=torch.float64)}, r"lr is torch.float64 of shape \(1,\); pass a scalar"),
    "lr's device": ({"lr": torch.ones((), dtype=torch.float64, device="meta")}, r"lr is on meta, .*pass lr.to\('cpu'\)"),
    "skip's dtype": ({"skip": torch.tensor(1.0)}, r"skip is torch.float32 of shape \(\); pass a scalar tensor of torch.bool"),
    "step's dtype": (
        {"steps": torch.tensor(1)},
        r"steps\[0\] is torch.int64 of shape \(\); pass a scalar tensor of torch.float32",
    ),
}


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(backend, case, adam):
    changes, message = BAD[case]
    if "steps" in changes and not adam:
        pytest.skip("an SGD counts no steps")
    (params,), grads = random_gradients(1, [(4, 3), (5,)]), random_gradients(2, [(4, 3), (5,)], seed=1)
    states = [[torch.ones_like(p) for p in params] for _ in range(2 if adam else 1)]
    for place, value in changes.items():
        if isinstance(place, tuple):
            grads[place[0]][place[1]] = value
    states[0] = changes.get("state", lambda s: s)(states[0])
    lr, skip = changes.get("lr", torch.tensor(0.1, dtype=torch.float64)), changes.get("skip")
    weights = changes.get("weights", torch.ones(2, dtype=torch.float64))
    before = [t.clone() for t in [*params, *(t for kept in states for t in kept)]]
    if adam:
        steps = [changes.get("steps", torch.ones(()))] * 2
        with pytest.raises(ValueError, match=message):
            combine_adam_(params, *states, [], steps, grads, weights, lr, skip)
    else:
        with pytest.raises(ValueError, match=message):
            combine_sgd_(params, *states, grads, weights, lr, skip, momentum=0.9)
    after = [*params, *(t for kept in states for t in kept)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_states_that_do_not_go_with_the_options(backend):
    params, one, lr = [torch.ones(3)], torch.ones(1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"momenta lists 1 tensors, but momentum is 0; pass \[\]"):
        combine_sgd_(params, [torch.ones(3)], [[torch.ones(3)]], one, lr)
    with pytest.raises(ValueError, match=r"max_exp_avg_sqs lists 1 tensors, but amsgrad is False; pass \[\]"):
        combine_adam_(params, *([torch.ones(3)] for _ in range(3)), [torch.ones(())], [[torch.ones(3)]], one, lr)
    with pytest.raises(ValueError, match="steps lists 0 tensors, params 1"):
        combine_adam_(params, [torch.ones(3)], [torch.ones(3)], [], [], [[torch.ones(3)]], one, lr)
    assert torch.equal(params[0], torch.ones(3))


def test_parameters_that_require_grad_are_refused_with_grad_enabled(backend):
    param = torch.ones(3, requires_grad=True)
    one, lr = torch.ones(1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"combine_sgd_ is not differentiable.*torch.no_grad\(\)"):
        combine_sgd_([param], [], [[torch.ones(3)]], one, lr)
    with torch.no_grad():
        combine_sgd_([param], [], [[torch.ones(3)]], one, lr)
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
