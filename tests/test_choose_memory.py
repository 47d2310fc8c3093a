"""choose_memory: its bytes are those that a step takes, its order is that of exactness, and its sentences say why."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.optim import host
from mtlkernels.optim.choose import mode_bytes, segments_of

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.race import peak_bytes

K = 8


class Wide(nn.Module):
    """Equal layers; activations take nothing, so that a step's peak is gradients alone."""

    def __init__(self, layers: int = 10, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(K))
        self.x = torch.randn(2, width)

    def losses(self) -> list[Tensor]:
        z = self.encoder(self.x)
        return [head(z).mean() for head in self.heads]


def modes(model: Wide) -> dict[str, mtl.optim.choose.ModeBytes]:
    return {own.mode: own for own in mtl.choose_memory(model.encoder.parameters(), K, 1e9, modules=list(model.encoder)).modes}


@pytest.mark.parametrize("mode", ["stored", "streamed", "host", "bfloat16", "online", "representation"])
def test_bytes_are_those_of_a_step(monkeypatch, mode):
    """Within a tenth of a gradient: a layer that autograd is at."""
    monkeypatch.setattr(host, "_empty_on_host", lambda p, dtype: torch.from_numpy(p.detach().numpy().copy()))
    monkeypatch.setattr(host, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(mtl.optim.choose, "BLOCK_BYTES", 2**18)
    model = Wide()
    rows = mode if mode in ("host", "bfloat16", "online") else "stored"
    heads = {k: head.parameters() for k, head in enumerate(model.heads)}
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, "pcgrad", shared=model.encoder.parameters(), heads=heads, rows=rows)

    def step() -> None:
        if mode == "representation":
            z = model.encoder(model.x)
            optimizer.step([head(z).mean() for head in model.heads], representation=z)
            return
        with mtl.cut(list(model.encoder) if mode == "streamed" else []) as cuts:
            losses = model.losses()
        optimizer.step(losses, cuts=cuts if mode == "streamed" else None)

    step()
    optimizer.zero_grad()
    whole = sum(p.nbytes for p in model.encoder.parameters())
    assert abs(peak_bytes(step) - modes(model)[mode].device) < 0.16 * whole


def test_the_order_is_exact_first(monkeypatch):
    model = Wide()
    whole = sum(p.nbytes for p in model.encoder.parameters())
    shared, cuts = list(model.encoder.parameters()), list(model.encoder)
    for budget, chosen in ((8.0, "stored"), (7.9, "streamed"), (1.0, "streamed"), (0.9, None)):
        assert mtl.choose_memory(shared, K, budget * whole, modules=cuts).chosen == chosen
    for budget, chosen in ((7.9, "bfloat16"), (4.0, "online"), (1.9, "representation")):
        assert mtl.choose_memory(shared, K, budget * whole).chosen == chosen
    assert mtl.choose_memory(shared, K, 2 * whole, weighting="mgda").chosen == "representation"
    assert mtl.choose_memory(shared, K, 5 * whole, modules=cuts, weighting="graddrop").chosen == "bfloat16"
    assert mtl.choose_memory(shared, K, whole, modules=cuts, weighting="moco").chosen is None
    assert mtl.choose_memory(shared, K, 10 * whole, modules=cuts, weighting="modo").chosen == "bfloat16"
    monkeypatch.setattr(mtl.optim.choose, "BLOCK_BYTES", 2**18)
    fake = [nn.Parameter(torch.empty_like(p, device="meta")) for p in shared]
    assert mtl.choose_memory(fake, K, 1.3 * whole).chosen == "host"


def test_words():
    model = Wide()
    text = str(mtl.choose_memory(model.encoder.parameters(), K, 6e6, modules=model.encoder, weighting="mgda"))
    assert "stored: takes 3.50 times the budget." in text
    assert "host: the parameters are in the host's memory, so that it saves nothing." in text
    assert "online: is for PCGrad, and the weighting is MGDA." in text
    assert text.endswith("Chosen: streamed (cuts=), the first that fits 6.0 MB, and exact.")
    text = str(mtl.choose_memory(model.encoder.parameters(), K, 1e6))
    assert text.endswith("Nothing fits 1.0 MB; the least is representation, 2.6 MB.")


def test_segments():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)), nn.Linear(8, 1))
    params = {id(p): p for p in model.parameters()}
    assert segments_of(params, []) == []
    assert segments_of(params, [model[0], model[1]]) == [80, 240, 36]
    assert sorted(segments_of(params, [model[1], model[1][0]])) == [80, 116, 160]
    assert mode_bytes([(100, 2)], 3)[3].device == 3 * 200 + 200  # 16-bit parameters stay


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], 2, 1.0), "shared has no parameter"),
        ((nn.Linear(2, 2), 2, 1.0), "shared is a Linear"),
        ((None, 0, 1.0), "num_tasks is 0"),
        ((None, True, 1.0), "num_tasks is True"),
        ((None, 2, 0), "budget is 0"),
        ((None, 2, float("nan")), "budget is nan"),
    ],
    ids=str,
)
def test_bad_input(arguments, match):
    shared, *rest = arguments
    with pytest.raises(ValueError, match=match):
        mtl.choose_memory(nn.Linear(2, 2).parameters() if shared is None else shared, *rest)
    with pytest.raises(ValueError, match="FAMO, which takes one backward pass"):
        mtl.choose_memory(nn.Linear(2, 2).parameters(), 2, 1e6, weighting="famo")
