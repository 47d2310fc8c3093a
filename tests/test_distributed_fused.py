"""Fused steps of sharded parameters are those of one process; replicated ones are refused."""

import pytest
import torch
from distributed_models import Setting
from torch import Tensor

INNER = {
    "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True, foreach=False),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr, foreach=False),
}


def trained(kind: str, inner: str, per: str) -> list[Tensor]:
    """Two fused steps, two of ``backward`` and ``step`` on the same state, and two fused ones; of one process none is fused."""
    setting = Setting(kind)
    fused = kind != "single"
    optimizer = setting.optimizer("cagrad", INNER[inner], fused=fused, per=per, max_norm=0.5)
    for number in range(6):
        if fused and number in (2, 3):
            optimizer.zero_grad()
            optimizer.backward(setting.losses(number))
            optimizer.step()
            continue
        info = optimizer.step(setting.losses(number))
        assert not fused or info.host_reads == 0
        assert not fused or all(p.grad is None for p in setting.module.parameters())
    return setting.values()


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp", "tp+fsdp"])
@pytest.mark.parametrize("inner", INNER)
def test_sharded_parameters_are_stepped_where_they_are(workers, kind, inner, per):
    expected = trained("single", inner, per)
    ranks = workers.run(2 if kind == "tp" else 4, trained, kind, inner, per)
    for values in ranks:
        for actual, value, first in zip(values, expected, ranks[0], strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)
            assert torch.equal(actual, first)


def refused() -> str:
    with pytest.raises(ValueError, match="fused is True, but a rank has a part of the gradients") as caught:
        Setting("ddp").optimizer("cagrad", fused=True)
    return str(caught.value)


def test_replicated_parameters_are_refused(workers):
    assert "fully_shard" in workers.run(2, refused)[0]
