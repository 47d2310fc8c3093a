"""The code of docs/distributed.md runs, on one rank and on two, to the same parameters."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from distributed_models import whole
from torch.testing import assert_close

TEXT = (Path(__file__).parent.parent / "docs/distributed.md").read_text()


def run_blocks(folder: str) -> list[list[torch.Tensor]]:
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)):
        exec(compile(block, f"docs/distributed.md, block {number + 1}", "exec"), names)
    assert names["sharded_optimizer"].ranks.size == torch.distributed.get_world_size()
    assert not names["info"].skipped
    return [[whole(param.detach()).clone() for param in names[model].parameters()] for model in ("model", "sharded")]


def test_code_runs(workers, tmp_path) -> None:
    (one,) = workers.run(1, run_blocks, str(tmp_path), timeout=120)

    for values in workers.run(2, run_blocks, str(tmp_path), timeout=120):
        assert_close(values, one, rtol=1e-3, atol=1e-4)  # float32, through AdamW


def test_tables_and_files_are_there() -> None:
    assert len(re.findall(r"^```python", TEXT, re.MULTILINE)) == 5
    files = re.findall(r"`((?:tests|docs|mtlkernels)/[\w./]+)`", TEXT)
    assert len(files) >= 3
    assert [file for file in files if not (Path(__file__).parent.parent / file).exists()] == []
