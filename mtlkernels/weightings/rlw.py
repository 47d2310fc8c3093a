"""Random weights of the losses."""

from .rgw import RGW


class RLW(RGW):
    """Random loss weighting (Lin et al. 2022, Algorithm 1): softmax(z) of standard normal z, the gradient of sum_k w_k L_k.

    On the shared parameters it is :class:`RGW`, with the same numbers for the same seed. The two differ in the parameters of a
    single task, which this one weighs and a weighting of gradients leaves alone, and in their cost: it takes one backward pass.

    Args:
        generator: draws the seeds, as :class:`~mtlkernels.weightings.seeded.SeededWeighting` says.
    """

    loss_only = True
