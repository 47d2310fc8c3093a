"""The code of docs/training_loops.md runs."""

import re
from pathlib import Path
from typing import Any

import torch

import mtlkernels as mtl

TEXT = (Path(__file__).parent.parent / "docs/training_loops.md").read_text()


def test_code_runs(capsys) -> None:
    torch._dynamo.reset()
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 15
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/training_loops.md, block {number + 1}", "exec"), names)
        if isinstance(info := names.get("info"), mtl.optim.StepInfo):
            assert not info.skipped
            assert info.host_reads == 0
    printed = capsys.readouterr().out
    assert "torch.float32 torch.bfloat16" in printed
    assert "None dict_keys(['step', 'exp_avg', 'exp_avg_sq'])" in printed
    assert names["scaler"].get_scale() == 2.0**16
    assert all(p.isfinite().all() for p in [*names["model"].parameters(), *names["shared"].values()])


def test_files_are_there() -> None:
    files = re.findall(r"`((?:tests|docs|mtlkernels)/[\w./]+)`", TEXT)
    assert len(files) >= 5
    assert [file for file in files if not (Path(__file__).parent.parent / file).exists()] == []
