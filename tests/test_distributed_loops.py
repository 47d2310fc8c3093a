"""Loss-only weightings and accumulated micro-batches on several ranks give what one process gives."""

import pytest
import torch
from distributed_models import Setting, losses_of, part_of_batch
from torch import Tensor

import mtlkernels as mtl


def loss_only(kind: str, name: str, steps: int) -> dict[str, list[Tensor]]:
    setting = Setting(kind)
    options = {"layer": setting.module.second.parameters()} if name == "gradnorm" else {}
    weighting = mtl.get_weighting(name, **options)
    inner = torch.optim.AdamW(setting.module.parameters(), lr=0.02)
    optimizer = mtl.MultiTaskOptimizer(inner, weighting, max_norm=0.5, **setting.options)
    infos = [optimizer.step(lambda step=step: setting.losses(step)) for step in range(steps)]
    return {
        "values": setting.values(),
        "weights": [info.weights for info in infos],
        "losses": [info.losses for info in infos],
        "norms": [info.norm for info in infos],
        "state": [buffer.nan_to_num(-1.0) for _, buffer in sorted(weighting.named_buffers())],
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp", "tp+fsdp"])
@pytest.mark.parametrize("name", ["famo", "gradnorm", "rlw", "uncertainty"])
def test_loss_only_training_is_that_of_one_process(workers, kind, name):
    if (name, kind) == ("rlw", "ddp"):
        torch.manual_seed(0)  # ranks draw from their own generators, and the first one's seed counts
    ranks = workers.run(4, loss_only, kind, name, 12)
    if name != "rlw":
        expected = loss_only("single", name, 12)
        for what, values in expected.items():
            for actual, value in zip(ranks[0][what], values, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6, msg=what)
    for rank in ranks[1:]:
        for what in ("values", "weights", "losses", "state"):
            assert all(torch.equal(a, b) for a, b in zip(rank[what], ranks[0][what], strict=True)), what


def accumulated(kind: str, micro_batches: int, calls: bool = False) -> dict[str, list[Tensor]]:
    """Steps of several micro-batches; ``calls``: counts reduce-scatters instead."""
    setting = Setting(kind)
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4))
    scatters = []
    original = optimizer.ranks.scatter
    optimizer.ranks.scatter = lambda row, params: scatters.append(1) or original(row, params)
    infos = []
    for step in range(8):
        parts = part_of_batch(step, *setting.data).chunk(micro_batches)
        for part in parts[:-1]:
            optimizer.accumulate({task: loss / micro_batches for task, loss in losses_of(setting.model(part), part).items()})
        last = {task: loss / micro_batches for task, loss in losses_of(setting.model(parts[-1]), parts[-1]).items()}
        infos.append(optimizer.step(last))
    if calls:
        return {"scatters": [torch.tensor(len(scatters))]}
    return {"values": setting.values(), "weights": [info.weights for info in infos], "losses": [info.losses for info in infos]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_accumulated_micro_batches_are_one_batch_of_one_process(workers, kind):
    expected = accumulated("single", 1)
    for rank in workers.run(2, accumulated, kind, 3):
        for what, values in expected.items():
            for actual, value in zip(rank[what], values, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6, msg=what)


def test_micro_batches_of_plain_parameters_are_reduced_once(workers):
    """As many rows travel as without accumulation: K of shared and of head parameters together, every step."""
    once, thrice = (workers.run(2, accumulated, "ddp", count, True)[0]["scatters"][0] for count in (1, 3))
    assert int(once) == 8 * 3
    assert int(thrice) == 8 * 6  # shared and head rows apart


def crossed(kind: str, steps: int) -> dict[str, list[Tensor]]:
    setting = Setting(kind)
    optimizer = setting.optimizer(mtl.MoDo(), max_norm=0.5)
    infos = [optimizer.step(setting.losses(2 * step), other=setting.losses(2 * step + 1)) for step in range(steps)]
    return {"values": setting.values(), "weights": [info.weights for info in infos], "norms": [info.norm for info in infos]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_batches_are_those_of_one_process(workers, kind):
    expected = crossed("single", 6)
    for rank in workers.run(2, crossed, kind, 6):
        for what, values in expected.items():
            for actual, value in zip(rank[what], values, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6, msg=what)


def cheaper(kind: str, gram_from: str, steps: int) -> dict[str, list[Tensor]]:
    """Weights from the Gram of the representation, of a sub-batch or its two halves, or of all gradients, by segments."""
    setting = Setting(kind)
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4), max_norm=0.5)
    kept: list[Tensor] = []
    setting.module.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    infos = []
    for step in range(steps):
        options = {
            "representation": lambda: {"representation": kept[-1]},
            "gram_losses": lambda step=step: {"gram_losses": setting.losses(100 + step)},
            "halves": lambda step=step: {"gram_losses": [setting.losses(100 + step), setting.losses(200 + step)]},
            "cuts": lambda: {"cuts": cuts},
            "stored": dict,
        }[gram_from]
        with mtl.cut([setting.module.first, setting.module.second] if gram_from == "cuts" else []) as cuts:
            losses = setting.losses(step)
        infos.append(optimizer.step(losses, **options()))
    errors = [info.gram_error for info in infos if info.gram_error is not None]
    return {
        "values": setting.values(),
        "weights": [info.weights for info in infos],
        "grams": [info.gram for info in infos],
        "norms": [info.norm for info in infos],
        "errors": errors,
    }


CHEAPER = [("ddp", name) for name in ("representation", "gram_losses", "halves", "cuts")] + [
    ("fsdp", "halves"),
    ("fsdp", "gram_losses"),
]


@pytest.mark.parametrize(("kind", "gram_from"), CHEAPER)
def test_cheaper_grams_are_those_of_one_process(workers, kind, gram_from):
    expected = cheaper("single", "stored" if gram_from == "cuts" else gram_from, 5)
    assert len(expected["errors"]) == (5 if gram_from == "halves" else 0)
    ranks = workers.run(2, cheaper, kind, gram_from, 5)
    for rank in ranks:
        for what, values in expected.items():
            for actual, value in zip(rank[what], values, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6, msg=what)
    for what in ("values", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(ranks[1][what], ranks[0][what], strict=True)), what


@pytest.mark.parametrize("gram_from", ["representation", "cuts"])
def test_what_needs_leaves_is_refused_for_dtensors(workers, gram_from):
    with pytest.raises(Exception, match=f"{gram_from} is given, but the parameters are DTensors"):
        workers.run(2, cheaper, "fsdp", gram_from, 1)
