"""The simulated CUDA library with faults planted in its bindings, for the tests that must catch them."""

from functools import cache

from simulated import Library, library

ADAPTIVE, MEMORY, GRAM, FINISH, EXCESS = (
    f"bindings/{name}_cuda.cpp" for name in ("perturb", "memory", "gram", "finish", "excess_risk")
)
FAULTS = [
    (ADAPTIVE, r"data_ptr\(\)\) \+ n", 'data_ptr()) + (fault("radius of the first") ? 0 : n)'),
    *(
        (binding, r"guard\((.*)\);", r'guard(fault("device guard") ? 0 : \1);')
        for binding in (ADAPTIVE, MEMORY, FINISH, EXCESS)
    ),
    *((binding, r"numel\}\);", 'numel - (fault("last element") ? 1 : 0)});') for binding in (MEMORY, FINISH, EXCESS)),
    (
        ADAPTIVE,
        r"perturb\(dtype, tensors,",
        'perturb(dtype, [&] { auto own = tensors; for (auto& t : own) t.numel -= fault("last element"); return own; }(),',
    ),
    (FINISH, r"copy_\(place, ", 'copy_(fault("finish aside stays") ? place = torch::stable::empty_like(place) : place, '),
    (FINISH, r"weight_row\(n\)", 'weight_row(fault("row of weights") ? 0 : n)'),
    (FINISH, r"if \(!steps\.empty\(\)\)", 'if (!steps.empty() && !fault("no step"))'),
    (MEMORY, r"copy_\(memory, ", 'copy_(fault("memory aside stays") ? memory = torch::stable::empty_like(memory) : memory, '),
    (EXCESS, r"factors \+ k\)", 'factors + (fault("factor of the first") ? 0 : k))'),
    (EXCESS, r"sums \+ block;", 'sums + (fault("sums of the first") ? 0 : block);'),
    (EXCESS, r"slots\.back\(\)\.end = int32_t\(block\)", 'slots.back().end = int32_t(block) - fault("last chunk")'),
    (GRAM, r"grads\.form == PairForm::none", 'grads.form == PairForm::none || fault("as they are")'),
    (GRAM, r"in_pairs\(grads, other", 'in_pairs(fault("wrong way round") ? other : grads, other'),
]


@cache
def faulty_library() -> Library:
    """One for a process: a dispatch key takes one library."""
    library()
    return Library("PrivateUse3", FAULTS)
