"""The code of docs/flat.md runs."""

import re
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parent.parent / "docs/flat.md").read_text()


def test_code_runs(capsys) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/flat.md, block {number + 1}", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    assert names["conflicts"].steps == 1
