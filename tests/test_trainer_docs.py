"""The code of docs/trainers.md runs, and what it names is there."""

import os
import re
from pathlib import Path
from typing import Any

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before transformers is imported

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "trainers.md").read_text()


def test_code_runs(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/trainers.md, block {number + 1}", "exec"), names)
        if "trainer" in names and "Module" in names:
            assert {"loss/depth", "weight/normals", "conflicts"} <= set(names["trainer"].logged_metrics)
    printed = capsys.readouterr().out
    assert len(re.findall(r"'loss/depth'.*'weight/normals'.*'conflicts'", printed)) >= 3
    assert "'grad_norm'" in printed


def test_files_are_there() -> None:
    prose = re.sub(r"^```python\n.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    files = re.findall(r"\]\(([\w./]+)\)", prose) + re.findall(r"`(?:python )?((?:tests|examples)/[\w./]+)`", prose)
    files += re.findall(r"^python .*?(examples/\w+\.py)", TEXT, re.MULTILINE)
    assert len(files) >= 9
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "docs" / file).exists(), file
