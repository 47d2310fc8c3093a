"""examples/language_model.py on two ranks: methods, checkpoints, a run that is killed; and its page's table."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import RankError, Workers
from language_model_runs import TINY, trained
from torch import Tensor
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import language_model as example  # noqa: E402
import language_model_table as page  # noqa: E402

RUNS = [(method, "model") for method in example.METHODS] + [("pcgrad", "tensor")]
PARTS = [("pcgrad", "tensor", "own"), ("famo", "model", "own"), ("mean", "model", "stream"), ("mean", "model", "schedule")]


def run(workers: Workers, ranks: int, *args: Any) -> list[tuple[list[Tensor], list[dict[str, Any]]]]:
    return workers.run(ranks, trained, *args, timeout=120)  # on a busy machine importing torch alone takes long


def same(first: tuple[list[Tensor], list[Any]], second: tuple[list[Tensor], list[Any]]) -> bool:
    return first[1] == second[1] and all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize(("method", "per"), RUNS)
def test_a_run_that_was_stopped_goes_on_to_the_bit(workers, tmp_path, method, per):
    options = {"method": method, "per": per}
    undisturbed = run(workers, 2, options)
    assert same(*undisturbed)
    assert [line["step"] for line in undisturbed[0][1]] == list(range(9))
    first, last = (sum(undisturbed[0][1][step]["bits"].values()) for step in (0, 8))
    assert last < first - 0.1
    conflicts = [line["conflicts"] for line in undisturbed[0][1][1:]]
    if method in ("plain", "famo"):
        assert conflicts == [None] * 8
    else:
        assert any(torch.tensor(share).any() for share in conflicts)

    run(workers, 2, options, str(tmp_path), 5)
    assert [path.name for path in example.checkpoints(tmp_path)] == ["step-0000003"]
    broken = tmp_path / "step-0000004"  # what is left of a run that was killed while it wrote a checkpoint
    broken.mkdir()
    (broken / "__0_0.distcp").write_bytes(b"half")
    assert same(run(workers, 2, options, str(tmp_path))[0], undisturbed[0])


def test_a_checkpoint_that_was_not_completed_does_not_count(workers, tmp_path):
    """The log may be ahead of the checkpoint: its lines of the steps that are taken again are dropped."""
    done = run(workers, 2, {"method": "mean"}, str(tmp_path))[0]
    first, last = example.checkpoints(tmp_path)
    assert (first.name, last.name) == ("step-0000006", "step-0000008")
    (last / ".metadata").unlink()
    assert same(run(workers, 2, {"method": "mean"}, str(tmp_path))[0], done)
    assert example.checkpoints(tmp_path) == [first, last]


@pytest.mark.parametrize(("method", "per", "without"), PARTS)
def test_every_part_of_a_checkpoint_counts(workers, tmp_path, method, per, without):
    """A run that goes on without a part ends elsewhere, so that the tests of whole runs can tell."""
    options = {"method": method, "per": per}
    first, second = tmp_path / "first", tmp_path / "second"
    run(workers, 2, options, str(first), 5)
    shutil.copytree(first, second)
    whole_run = run(workers, 2, options, str(first))[0]
    lacking = run(workers, 2, options, str(second), None, without)[0]
    assert [line["step"] for line in whole_run[1]] == [line["step"] for line in lacking[1]]
    assert not same(whole_run, lacking)


@pytest.mark.parametrize(("method", "per"), [("plain", "model"), ("pcgrad", "tensor"), ("cagrad", "model"), ("famo", "model")])
def test_one_process_is_two(workers, method, per):
    """The rows of a step are the same, in other micro-batches: float32 sums in another order, through five AdamW steps."""
    options = {"method": method, "per": per, "precision": "float32", "steps": 5}
    one, two = (run(workers, ranks, options)[0] for ranks in (1, 2))
    for first, second in zip(one[1], two[1], strict=True):
        assert_close(first.get("losses"), second.get("losses"), rtol=1e-4, atol=1e-5)
        assert_close(first.get("bits"), second.get("bits"), rtol=1e-4, atol=1e-5)
    assert_close(one[0], two[0], rtol=1e-3, atol=1e-4)


def test_equal_weights_are_plain_adamw(workers):
    plain, mean = (run(workers, 2, {"method": method, "precision": "float32"})[0] for method in ("plain", "mean"))
    assert_close([line["losses"] for line in plain[1][1:]], [line["losses"] for line in mean[1][1:]], rtol=1e-4, atol=1e-5)
    assert_close([line["norm"] for line in plain[1][1:]], [line["norm"] for line in mean[1][1:]], rtol=1e-4, atol=1e-5)


def test_ranks_share_the_rows_of_each_domain():
    """Each row once in a pass, the next pass in another order, and a stream that is told its place goes on from there."""
    numbers = torch.arange(40, dtype=torch.uint8)
    texts = {name: example.Text(numbers + shift, numbers, ("a",), ("b",)) for name, shift in (("x", 0), ("y", 100))}
    one, two, again = (example.Stream(texts, 4, seed=0) for _ in range(3))
    parts = [[two.take(5, rank, 1)["y"] for rank in (0,)] for _ in range(4)]
    first, second = (torch.cat([part[0] for part in parts[n : n + 2]]) for n in (0, 2))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(100, 140, 4))
    assert first.tolist() != second.tolist()

    halves = [one.take(4, 0, 2), again.take(4, 1, 2)]
    assert sorted(torch.cat([half["x"] for half in halves]).tolist()) == sorted(
        example.Stream(texts, 4, 0).take(4, 0, 1)["x"].tolist()
    )
    again.load_state_dict({"taken": 5})
    assert torch.equal(again.take(5, 0, 1)["y"], parts[1][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 6}, "batch is 6, which 4 equal parts"),
        ({"eval_rows": 3}, "eval_rows is 3"),
        ({"width": 15}, "width is 15"),
        ({"steps": 0}, "steps is 0"),
        ({"method": "plain", "per": "tensor"}, "plain AdamW has no weights"),
        ({"eval_rows": 2000}, "a test part has"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(workers, options, message):
    with pytest.raises(RankError, match=message):
        run(workers, 2, options)


def test_a_folder_of_another_run_is_refused(workers, tmp_path):
    run(workers, 2, {"method": "mean"}, str(tmp_path), 4)
    with pytest.raises(RankError, match="has a run with method=mean, not famo; pass another folder"):
        run(workers, 2, {"method": "famo"}, str(tmp_path))


def test_killed_under_torchrun(workers, tmp_path, monkeypatch):
    """SIGKILL of both ranks after step 7; the command that started the run completes it."""
    options = {**TINY, "method": "famo"}
    argv = []
    for name, value in options.items():
        argv += ["--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [str(value)])]
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    died = page.torchrun("language_model_table.py", "--worker", "dying", "7", *argv, "--folder", str(folder))
    assert died.returncode
    assert "SIGKILL" in died.stderr
    assert [path.name for path in example.checkpoints(folder)] == ["step-0000003", "step-0000006"]
    done = page.torchrun("language_model.py", *argv, "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    assert "famo per model, steps 6 to 8" in done.stdout

    run(workers, 2, {"method": "famo"}, str(undisturbed))
    assert page.differences(folder, undisturbed) == []
    lines = example.read_lines(folder / "log.jsonl")
    lines[-1]["losses"][0] += 1e-9
    example.write_lines(folder / "log.jsonl", lines)
    assert page.differences(folder, undisturbed) == ["log"]


def test_table_is_recomputed_by_hand():
    def run_of(python: float, topics: float, seconds: float, conflicts: Any) -> page.Run:
        last = {"step": 10, "seconds": seconds, "conflicts": conflicts, "bits": {"python": python, "topics": topics}}
        return page.Run([{"step": 0, "seconds": 0.0, "bits": {"python": 8.0, "topics": 8.0}}, last], 2_500_000)

    runs = {"plain": [run_of(2.0, 3.0, 1.0, None), run_of(2.2, 3.2, 2.0, None)]}
    runs |= {"mean": [run_of(2.0, 3.0, 2.0, 0.5), run_of(2.2, 3.2, 4.0, 0.5)], "famo": [run_of(1.8, 3.0, 1.0, None)] * 2}
    runs |= {"pcgrad tensor": [run_of(2.1, 3.1, 1.0, [0.0, 1.0]), run_of(2.3, 3.4, 2.0, [1.0, 1.0])]}
    head, *rows = page.rows_of(runs)
    assert head[:3] == ["method", "python", "topics"]
    assert rows[0] == ["plain AdamW", "2.100 ± 0.141", "3.100 ± 0.141", "-", "-", "1", "2.5"]
    assert rows[1][3:] == ["+0.000 ± 0.000", "50 ± 0", "2.00 ± 0.00", "2.5"]
    assert rows[2][3:5] == ["-0.200 ± 0.141", "-"]
    assert rows[3][3:5] == ["+0.125 ± 0.035", "75 ± 35"]
    assert page.verdict(runs).endswith("equal weights not told apart; FAMO not told apart; PCGrad per tensor worse.")


def test_committed_page_has_every_method():
    text = (ROOT / "docs" / "language_model.md").read_text()
    assert "Written by `python examples/language_model_table.py`:" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if " ± " in line and line.startswith("|")] == [
        f"| {name}" for name in page.METHODS.values()
    ]
    for method in page.METHODS:
        assert " ".join(page.arguments(method, 0, example.Config.steps)) in text
