"""The simulated CUDA library with faults planted in its bindings, for the tests that must catch them."""

from functools import cache

from simulated import Library, library

ADAPTIVE, MEMORY, GRAM = (f"bindings/{name}_cuda.cpp" for name in ("perturb", "memory", "gram"))
FAULTS = [
    (ADAPTIVE, r"values \+ n", 'values + (fault("radius of the first") ? 0 : n)'),
    *((binding, r"guard\((.*)\);", r'guard(fault("device guard") ? 0 : \1);') for binding in (ADAPTIVE, MEMORY)),
    *((binding, r"numel\}\);", 'numel - (fault("last element") ? 1 : 0)});') for binding in (ADAPTIVE, MEMORY)),
    (MEMORY, r"copy_\(memory, ", 'copy_(fault("memory aside stays") ? memory = torch::stable::empty_like(memory) : memory, '),
    (GRAM, r"grads\.form == PairForm::none", 'grads.form == PairForm::none || fault("as they are")'),
    (GRAM, r"in_pairs\(grads, other", 'in_pairs(fault("wrong way round") ? other : grads, other'),
]


@cache
def faulty_library() -> Library:
    """One for a process: a dispatch key takes one library."""
    library()
    return Library("PrivateUse3", FAULTS)
