"""The demo's numbers recomputed by hand, its picture and its command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from mtlkernels import demo, plot
from mtlkernels.__main__ import main
from mtlkernels.data import MultiDigits

STEPS, SEEDS, SIZES = 40, 2, (1_000, 300)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, list[demo.Run]], int]:
    """Every method's runs, and how often the progress bar moved."""
    moves = []
    runs = demo.train(list(demo.METHODS), SEEDS, STEPS, SIZES, lambda: moves.append(1))
    return runs, len(moves)


@pytest.fixture(scope="module")
def runs(trained: tuple[dict[str, list[demo.Run]], int]) -> dict[str, list[demo.Run]]:
    return trained[0]


def test_every_step_of_every_run_is_recorded(trained: tuple[dict[str, list[demo.Run]], int]) -> None:
    runs, moves = trained

    assert moves == SEEDS * STEPS * (2 + 4)
    for method, done in runs.items():
        assert len(done) == SEEDS
        for run in done:
            assert run.losses.shape == (STEPS, 2)
            assert run.cosine.shape == (0 if method == "single" else STEPS, 3, 3)
            assert run.step_ms > run.ops_ms >= 0
            assert (run.ops_ms == 0) == (method == "single")


def test_all_methods_start_alike_and_learn(runs: dict[str, list[demo.Run]]) -> None:
    for seed in range(SEEDS):
        first = runs["single"][seed].losses[0]
        for done in runs.values():
            run = done[seed]
            torch.testing.assert_close(run.losses[0], first)
            assert (run.losses[-5:].mean(0) < 0.9 * run.losses[:5].mean(0)).all()
            assert min(run.accuracy) > 20  # percent; guessing gives 10
    assert not torch.equal(runs["mean"][0].losses, runs["mean"][1].losses)
    assert not torch.equal(runs["mean"][0].losses, runs["mgda"][0].losses)


def test_equal_weights_is_the_plain_training_loop(runs: dict[str, list[demo.Run]]) -> None:
    train, test = MultiDigits.load(*SIZES)
    torch.manual_seed(0)
    net = demo.TwoTaskNet()
    optimizer = torch.optim.Adam(net.parameters(), demo.LEARNING_RATE)
    history = []
    for index in demo.batches(train, STEPS, 0):
        losses = net.losses(train.images[index], {task: labels[index] for task, labels in train.labels.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for parameter in net.trunk.parameters():
            parameter.grad /= 2
        optimizer.step()
        history.append(torch.stack([loss.detach() for loss in losses.values()]))

    # Equal up to rounding, which 40 steps of Adam amplify: float32 eps 6e-8, three orders of magnitude of room.
    torch.testing.assert_close(runs["mean"][0].losses, torch.stack(history), rtol=1e-4, atol=1e-4)
    assert runs["mean"][0].accuracy == pytest.approx([net.accuracy(test, task) for task in demo.TASKS], abs=1.0)


def test_table_is_recomputed_by_hand(runs: dict[str, list[demo.Run]]) -> None:
    table = {cells[0]: cells[1:] for cells in demo.rows(runs)}
    single = np.array([run.accuracy for run in runs["single"]])

    assert list(table) == list(demo.METHODS.values())
    for method, name in demo.METHODS.items():
        accuracy = np.array([run.accuracy for run in runs[method]])
        for k in range(2):
            assert table[name][k] == f"{accuracy[:, k].mean():.1f} ± {accuracy[:, k].std(ddof=1):.1f}"
        if method == "single":
            assert [table[name][i] for i in (2, 3, 5)] == ["-"] * 3
            continue
        delta = 100 * ((accuracy - single) / single).mean(1)
        conflicts = np.array([100 * np.mean(run.cosine[:, 0, 1].numpy() < 0) for run in runs[method]])
        step, ops = (np.mean([getattr(run, name) for run in runs[method]]) for name in ("step_ms", "ops_ms"))
        assert table[name][2] == f"{delta.mean():+.1f} ± {delta.std(ddof=1):.1f}"
        assert table[name][3] == f"{conflicts.mean():.0f} ± {conflicts.std(ddof=1):.0f}"
        assert table[name][4:] == [f"{step:.2f}", f"{100 * ops / step:.0f}"]


def test_table_without_single_task_has_no_gain_to_show(runs: dict[str, list[demo.Run]]) -> None:
    (cells,) = demo.rows({"mgda": runs["mgda"][:1]})

    assert cells[3] == "-"
    assert "±" not in "".join(cells)  # one seed has no spread


def test_delta_m_is_positive_when_better() -> None:
    # ((90 - 80) / 80 + (60 - 75) / 75) / 2 = (0.125 - 0.2) / 2
    assert demo.delta_m((90.0, 60.0), (80.0, 75.0)) == pytest.approx(-3.75)
    assert demo.delta_m((88.0, 75.0), (80.0, 75.0)) == pytest.approx(5.0)


def test_gram_with_the_update_is_that_of_the_vectors() -> None:
    grads = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.3, 1.2], dtype=torch.float64)
    rows = torch.cat([grads, (weights @ grads).unsqueeze(0)])

    torch.testing.assert_close(demo.with_update(grads @ grads.T, weights), rows @ rows.T)


def test_quick_command_prints_the_table_and_writes_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "quick.png"
    command = [sys.executable, "-m", "mtlkernels", "demo", "--quick", "--output", str(picture)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    for name in demo.METHODS.values():
        assert name in done.stdout
    assert "…" not in done.stdout  # nothing cut short at 80 columns
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] > pixels.shape[0] > 800
    for quarter in (pixels[: len(pixels) // 2, : pixels.shape[1] // 2], pixels[len(pixels) // 2 :, pixels.shape[1] // 2 :]):
        assert quarter.std() > 0.05
    colours = {tuple(colour) for colour in (pixels[::2, ::2] * 255).round().astype(int).reshape(-1, 3)}
    assert {(0, 114, 178), (230, 159, 0), (0, 158, 115)} <= colours  # three methods' lines are there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "0 is not positive"),
        (["--methods", "no_such_method"], "invalid choice"),
        (["--output", "no/such/folder/demo.png"], "is not a directory"),
        (["--output", "demo.doc"], r"ends in none of .png, .pdf, .svg"),
    ],
    ids=["steps", "methods", "folder", "format"],
)
def test_bad_arguments_are_refused_before_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])

    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")])
def test_a_missing_package_is_named(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert main(["demo", "--quick"]) == 1
    assert f"pip install {package}" in capsys.readouterr().err


def test_moving_average_is_a_convolution() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20))

    steps, means = plot.moving_average(values, 5)

    np.testing.assert_allclose(means, [np.convolve(row, np.full(5, 0.2), "valid") for row in values], atol=1e-12)
    np.testing.assert_allclose(steps, np.arange(2, 18))


def test_curves_show_the_mean_and_the_range_of_the_seeds() -> None:
    losses = np.exp(np.random.default_rng(0).normal(size=(3, 12)))

    (axes,) = plot.loss_curves({"one": losses, "none": np.empty((1, 0))}, window=1).axes

    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_ydata(), losses.mean(0))
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    np.testing.assert_allclose((low, high), (losses.min(), losses.max()))


def test_matrix_shows_its_values() -> None:
    values = np.array([[1.0, -0.25, 0.5], [0.75, 0.9, 0.0], [0.1, -1.0, 0.3]])

    (axes,) = plot.cosine_matrix(values, ("a", "b", "c")).axes

    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), values)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(j, i): f"{values[i, j]:+.2f}" for i, j in np.ndindex(3, 3)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_plots_refuse_arrays_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"losses\['x'\] has shape \(3,\); pass \[seeds, steps\]"):
        plot.loss_curves({"x": np.ones(3)})
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\); 3 tasks take \[3, 3\]"):
        plot.cosine_matrix(np.eye(2), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"points\['x'\] has shape \(2, 3\)"):
        plot.accuracy_plane({"x": np.ones((2, 3))}, ("a", "b"))
    with pytest.raises(ValueError, match="tasks lists 3 names"):
        plot.training_summary({}, {}, {}, ("a", "b", "c"), title="")
