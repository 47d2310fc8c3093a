"""The model of the L2 cache behind docs/kernels.md."""

import pytest
from l2 import CHUNK, share_from_dram, slices

MIB = 1 << 20


@pytest.mark.parametrize("order", ["in order", "chunks from the end", "from the end"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_slice_is_read_once(order, at_once):
    assert sorted(slices(10, at_once, order)) == list(range(80))


@pytest.mark.parametrize("order", ["in order", "chunks from the end", "from the end"])
def test_what_fits_is_read_from_dram_once(order):
    assert share_from_dram(CHUNK * 100, 2, 4, 50 * MIB, (8, 8), order) == 0


def test_in_order_nothing_of_a_large_model_is_left():
    assert share_from_dram(CHUNK * 1000, 2, 4, 50 * MIB, (8, 8), "in order") == 1


def test_from_the_end_what_fits_beside_the_result_is_left():
    # K rows stay, and the result of what was read displaces some of them: L2 = left (1 + 1 / K).
    elements, num_tasks = CHUNK * 1000, 2
    left = 1 - share_from_dram(elements, num_tasks, 4, 50 * MIB, (8, 8), "from the end")
    assert left == pytest.approx(50 * MIB / (elements * num_tasks * 4) / 1.5, rel=0.02)


def test_blocks_in_flight_that_outgrow_the_cache_need_their_slices_from_the_end_too():
    sizes = CHUNK * 4000, 8, 4, 50 * MIB, (264, 264)
    assert share_from_dram(*sizes, "chunks from the end") > 0.99
    assert share_from_dram(*sizes, "from the end") < 0.97
