"""Kernels in Triton behind the ops that read gradients; ``OPS`` below lists them.

For NVIDIA GPUs without the compiled CUDA library, for ROCm and XPU. A launch per dtype and stage whatever the number of
tensors: pointer tables are copied to the device once a call, and the host waits for nothing. Tiles and warps come from offline
tables in the ops' own files, so that no step ever tunes. :mod:`.targets` lists every kernel for compilation ahead of time.

Imported by :mod:`mtlkernels.dispatch` when an op first runs here, because importing Triton takes long. With the environment
variable TRITON_INTERPRET=1, set before that, the kernels run in Triton's interpreter on CPU tensors.
"""

from . import (
    combine,
    excess_risk,
    finish,
    graddrop,
    gradient_dropout,
    gram,
    gram_combine,
    memory,
    perturb,
    priority,
    trimmed_mean,
)

OPS = {
    "gram": gram.gram,
    "cross_gram": gram.cross_gram,
    "paired_gram": gram.paired_gram,
    "combine": combine.combine,
    "combine_": combine.combine_,
    "gram_combine_": gram_combine.gram_combine_,
    "combine_channels": combine.combine_channels,
    "combine_channels_": combine.combine_channels_,
    "mix": combine.mix,
    "combine_sgd_": finish.combine_sgd_,
    "combine_adam_": finish.combine_adam_,
    "perturb_": perturb.perturb_,
    "memory_combine_": memory.memory_combine_,
    "excess_risk": excess_risk.excess_risk,
    "priority_combine": priority.priority_combine,
    "priority_combine_": priority.priority_combine_,
    "graddrop": graddrop.graddrop,
    "graddrop_": graddrop.graddrop_,
    "gradient_dropout": gradient_dropout.gradient_dropout,
    "gradient_dropout_": gradient_dropout.gradient_dropout_,
    "trimmed_mean": trimmed_mean.trimmed_mean,
    "trimmed_mean_": trimmed_mean.trimmed_mean_,
}
"""Op name -> implementation with the op's own signature."""
