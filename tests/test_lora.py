"""examples/lora.py: adapters of the real MiniLM are what tasks share, and nothing else moves."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before transformers is imported

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import lora as example

import mtlkernels as mtl

DOMAINS = ("python", "headers")
LENGTH = 12


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return example.load_model()


@pytest.fixture(scope="module")
def data(loaded) -> dict[str, example.Pairs]:
    return example.load_pairs(DOMAINS, loaded[1], LENGTH, max_bytes=100_000)


def test_passages_follow_each_other_within_a_document(loaded):
    tokenizer = loaded[1]
    documents = ["one two three four five six seven eight nine ten", "red green blue", "a b c d e f g h i j"]
    text = torch.tensor(list(b"".join(document.encode() + b"\0" for document in documents)), dtype=torch.uint8)
    pairs = example.pairs_of(text, tokenizer, 4)
    assert [tokenizer.decode(passage) for passage in pairs.flatten(0, 1)] == [
        f"[CLS] {words} [SEP]"
        for words in ("one two", "three four", "five six", "seven eight", "a b", "c d", "e f", "g h")  # whole pairs only
    ]


def test_gradients_are_those_of_the_adapters(loaded, data):
    model = example.with_adapters(copy.deepcopy(loaded[0]), 0).eval()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in adapters) == 6 * 2 * 2 * 8 * 384  # layers, places, factors, rank, width
    with torch.no_grad():  # away from zero, where the gradient of one factor vanishes
        for n, p in enumerate(adapters):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)), alpha=0.05)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    def losses() -> dict[str, torch.Tensor]:
        return {name: example.info_nce(example.logits_of(model, pairs.train[:4])) for name, pairs in data.items()}

    rows = [torch.autograd.grad(loss, adapters) for loss in losses().values()]
    expected = mtl.aggregate(rows, "upgrad")
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(adapters, 0.1), "upgrad", shared=adapters)
    info = optimizer.backward(losses())
    torch.testing.assert_close(info.gram, mtl.gram(rows))
    for p, grad in zip(adapters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
        assert grad.abs().max() > 0
    optimizer.step()
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None
            assert torch.equal(p, frozen[name])


def test_training_finds_the_passages_that_it_trains_on(loaded, data, monkeypatch):
    few = {name: example.Pairs(pairs.train[:8], pairs.train[:8]) for name, pairs in data.items()}
    monkeypatch.setattr(example, "load_model", lambda: copy.deepcopy(loaded))
    monkeypatch.setattr(example, "TEST", 8)
    before, _ = example.evaluate(loaded[0], few)
    options = example.parse(["--steps", "8", "--batch", "6", "--learning-rate", "3e-3"])
    for method in ("single", "cagrad"):
        run = example.train(few, method, options, 0)
        assert sum(run.accuracy.values()) > sum(before.values())
        assert set(run.accuracy) == set(DOMAINS)
    assert 0 <= run.conflicts <= 100


def test_a_perfect_answer_has_no_loss():
    assert example.info_nce(50 * torch.eye(5)) < 1e-6
    torch.testing.assert_close(example.info_nce(torch.zeros(5, 5)), torch.tensor(5.0).log())
    assert example.info_nce(50 * torch.eye(5).roll(1, 0)) > 40


def test_it_prints_its_table(capsys, monkeypatch, data):
    monkeypatch.setattr(example, "load_pairs", lambda *_: data)
    monkeypatch.setattr(example, "TEST", 6)
    assert (
        example.main(["--domains", *DOMAINS, "--methods", "single", "mean", "--steps", "1", "--batch", "2", "--seeds", "2"])
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("2 gradients of 73,728 adapter parameters take 0.6 MB in float32; of all 22,786,944")
    assert "| method | python, % | headers, % | mean, % | mean test loss | conflicts, % |" in printed
    for name in ("no adapters", "own adapters", "`mean`"):
        assert f"\n| {name} |" in printed
    assert printed.count(" ± ") >= 8


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        example.parse(["--batch", "1"])
    assert "--batch 2 or more" in capsys.readouterr().err
