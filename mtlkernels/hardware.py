"""What GPUs can do at most: datasheet figures, of which lower bounds of times are made. Nothing here was measured."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Figures of one GPU; bytes and operations a second, a link's in one direction."""

    title: str
    memory: float
    """Bytes."""
    bandwidth: float
    half_flops: float
    """16-bit matrix products, dense."""
    float_flops: float
    """float32 outside of the tensor cores, as torch multiplies unless it is told otherwise."""
    node_link: float
    """To the other GPUs of a node."""
    network: float
    """To other nodes: one port a GPU, of 400 Gbit/s, and of 200 for A100 and RTX 4090."""
    host_link: float
    """To the host's memory: 16 lanes of PCIe 5, and of PCIe 4 for A100 and RTX 4090."""


GPUS = {
    "A100": Gpu("A100-80GB SXM", 80e9, 2039e9, 312e12, 19.5e12, 300e9, 25e9, 32e9),
    "H100": Gpu("H100 SXM", 80e9, 3350e9, 989e12, 67e12, 450e9, 50e9, 64e9),
    "H200": Gpu("H200 SXM", 141e9, 4800e9, 989e12, 67e12, 450e9, 50e9, 64e9),
    "B200": Gpu("B200", 180e9, 8000e9, 2250e12, 75e12, 900e9, 50e9, 64e9),
    "RTX4090": Gpu("RTX 4090", 24e9, 1008e9, 165e12, 82.6e12, 32e9, 25e9, 32e9),
}
"""Titles and bandwidths are those that ``tests/ptxsim`` bounds the kernels by, which a test compares."""
