"""The README's code runs, and what it names is there."""

import re
from pathlib import Path
from typing import Any

import pytest

import mtlkernels as mtl
from mtlkernels.weightings import CROSS, ELEMENTWISE, LOSS_ONLY, MEMORY, REGISTRY

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    return TEXT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4

    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number + 1}", "exec"), names)

    assert isinstance(names["optimizer"], mtl.MultiTaskOptimizer)
    assert isinstance(names["priority"], mtl.TaskPriorityOptimizer)
    assert names["report"].losses.shape == (2,)
    assert names["info"].cosine.shape == (2, 2)
    assert [d.shape for d in names["update"]] == [p.shape for p in names["encoder"].parameters()]
    assert "tensor" in capsys.readouterr().out


def test_ops_are_there() -> None:
    first_cells = [row.split("|")[1] for row in section("Ops").splitlines() if row.startswith("| `")]
    names = re.findall(r"`(\w+)", " ".join(first_cells))

    assert {"gram", "combine", "mix", "project", "aggregate", "cosine"} <= set(names)
    assert all(callable(getattr(mtl, name)) for name in names)


def test_weightings_are_those_of_the_registry() -> None:
    rows = re.findall(r"^\| (`.+?`) \| (`.+?`) \|", section("Weightings"), re.MULTILINE)
    names, classes = (re.findall(r"\w+", " ".join(cells)) for cells in zip(*rows, strict=True))

    registered = {**REGISTRY, **LOSS_ONLY, **MEMORY, **CROSS, **ELEMENTWISE}
    assert {name: getattr(mtl, own) for name, own in zip(names, classes, strict=True)} == registered


def test_files_and_commands_are_there() -> None:
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", prose) + re.findall(r"`((?:mtlkernels|csrc|tests|benchmarks|\.ci)/[\w./]*)`", prose)
    assert {"LICENSE", "docs/multidigits.png", ".ci/run", "mtlkernels/ops.py"} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []

    makefile = (ROOT / "Makefile").read_text()
    targets = {word for words in re.findall(r"make ([a-z][a-z -]*)", TEXT) for word in words.split()}
    targets &= {"demo", "test", "test-all", "bench", "lint", "wheel", "clean"}
    assert {"demo", "test", "test-all", "bench"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_picture_is_small() -> None:
    assert (ROOT / "docs/multidigits.png").stat().st_size < 200_000


def test_code_of_the_page_on_task_priority_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "priority.md").read_text()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
        exec(compile(block, f"docs/priority.md, python block {number + 1}", "exec"), {})
    printed = capsys.readouterr().out
    assert "0.weight (16, 3, 3, 3): norm after it: encoder.1" in printed
    assert "heads.depth.weight (1, 16, 1, 1): plain sum" in printed
