"""The examples run: their quick mode, what it writes, and the numbers of its table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import mtlkernels as mtl
from mtlkernels.data import FASHION_MNIST, MultiDigits
from mtlkernels.demo import delta_m

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import priority as example  # noqa: E402


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "priority.py"), "--quick", "--output", str(folder), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("data", ["digits", pytest.param("fashion", marks=pytest.mark.slow)])
def test_quick_mode_writes_the_page_and_the_pictures(tmp_path, data):
    if data == "fashion" and not FASHION_MNIST.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    printed = run(tmp_path, "--data", data)
    page = (tmp_path / "priority_results.md").read_text()
    assert page in printed
    for name in example.METHODS.values():
        assert f"| {name} |" in page
    assert page.count("±") == 4 * len(example.METHODS)  # but single tasks have no gain, and the text has one
    for picture in ("priority_results.png", "priority_trends.png"):
        assert f"]({picture})" in page
        pixels = imread(tmp_path / picture)[..., :3]
        assert pixels.shape[1] > 600
        assert pixels.std() > 0.05


def test_committed_page_is_what_the_full_command_writes():
    page = (ROOT / "docs" / "priority_results.md").read_text()
    assert "Written by `python examples/priority.py`:" in page
    assert all(f"| {name} |" in page for name in example.METHODS.values())
    for picture in ("priority_results.png", "priority_trends.png"):
        assert (ROOT / "docs" / picture).stat().st_size < 200_000


@pytest.fixture(scope="module")
def runs() -> dict[str, list[example.Run]]:
    options = example.parse(["--quick", "--data", "digits", "--output", "."])
    data = MultiDigits.load(600, 200)
    return {method: [example.train(method, data, seed, options) for seed in range(2)] for method in example.METHODS}


def test_table_is_recomputed_by_hand(runs):
    table = {cells[0]: cells[1:] for cells in example.rows(runs)}
    for method, done in runs.items():
        for k in range(2):
            values = torch.tensor([run.accuracy[k] for run in done], dtype=torch.float64)
            assert table[example.METHODS[method]][k] == f"{values.mean():.1f} ± {values.std():.1f}"
        if method != "single":
            gains = [delta_m(run.accuracy, alone.accuracy) for run, alone in zip(done, runs["single"], strict=True)]
            gains = torch.tensor(gains, dtype=torch.float64)
            assert table[example.METHODS[method]][2] == f"{gains.mean():+.2f} ± {gains.std():.2f}"


def test_every_method_starts_alike_and_sees_the_same_batches(runs):
    first = {method: done[0].losses[0] for method, done in runs.items()}
    for method in ("phase1", "sequential", "mixed", "phase1_pcgrad"):
        assert torch.equal(first[method], first["phase1"])
    assert torch.equal(first["equal"], first["phase2"])
    assert torch.equal(first["equal"][0], first["phase1"][0])
    assert not torch.equal(first["equal"][1], first["phase1"][1])  # after a step of the first task
    assert len(runs["equal_half"][0].losses) == 2 * len(runs["equal"][0].losses)
    for method, done in runs.items():
        for one in done:
            assert one.losses[-5:].mean() < one.losses[:5].mean()
            if method != "single":
                assert one.shares.shape[1:] == (len(one.layers), 2)
                torch.testing.assert_close(one.shares.sum(2), torch.full(one.shares.shape[:2], 100.0, dtype=torch.float64))


def test_equal_weights_is_the_plain_training_loop(runs):
    options = example.parse(["--quick", "--data", "digits", "--output", "."])
    train_set, _ = MultiDigits.load(600, 200)
    torch.manual_seed(0)
    net = example.SmallResNet(options.width, 11)
    mtl.nn.to_task_norms(net.encoder, example.TASKS)
    optimizer = torch.optim.Adam(net.parameters(), options.lr)
    steps = options.epochs * options.steps
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps))).item()
        index = torch.randint(len(train_set), (example.BATCH,), generator=generator)
        losses = []
        for task in example.TASKS:
            with mtl.nn.task(task):
                out = net(train_set.images[index], task)
            losses.append(torch.nn.functional.cross_entropy(out, train_set.labels[task][index]))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append(torch.stack(losses).detach().double())
    # Rounding in float32, which eight steps of Adam amplify.
    torch.testing.assert_close(runs["equal"][0].losses[:8], torch.stack(history), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "take positive numbers"),
        (["--output", "no/such/folder"], "is not a directory"),
        (["--data", "x"], "choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert message in capsys.readouterr().err
