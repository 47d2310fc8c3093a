"""The trainer examples: each trainer's own clipping, accumulation, schedule, checkpoint and log, against the plain loop."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before transformers is imported

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import trainer_plain  # noqa: E402
from trainer_task import TASKS, Digits, Net, Result, Settings, main, optimizer_of  # noqa: E402

import mtlkernels as mtl  # noqa: E402
from mtlkernels.trainers import joint_loss  # noqa: E402

TRAINERS = ("accelerate", "huggingface", "lightning")
SETTINGS = Settings(updates=8, batch=8, parts=3, max_norm=0.2, warmup=2)
# The same float32 sums, but 1/3 of a loss is a product here and a quotient there; Adam divides what it makes of it by its root.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def example(name: str) -> Any:
    return importlib.import_module(f"trainer_{name}")


def parameters(result: Result) -> list[torch.Tensor]:
    return [p.detach() for p in result.net.parameters()]


def assert_close(actual: Result, expected: Result, **tolerance: float) -> None:
    for one, other in zip(parameters(actual), parameters(expected), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


def assert_differ(one: Result, other: Result) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_close(one, other)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trainer_plain.train(SETTINGS, tmp_path_factory.mktemp("plain"), False)


@pytest.fixture(scope="module", params=TRAINERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Result, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, example(request.param).train(SETTINGS, folder, False), folder


def test_plain_loop_clips_accumulates_and_schedules(plain, tmp_path):
    values = vars(SETTINGS)
    whole = trainer_plain.train(Settings(**values | {"batch": 24, "parts": 1}), tmp_path, False)
    assert_close(plain, whole)  # the last batch alone, or the gradients of all, are not
    for change in ({"max_norm": 1e9}, {"warmup": 0}, {"method": "mean"}):
        assert_differ(plain, trainer_plain.train(Settings(**values | change), tmp_path, False))


def test_parameters_are_those_of_the_plain_loop(trained, plain):
    assert_close(trained[1], plain)


def test_log_is_that_of_the_plain_loop(trained, plain):
    history = trained[1].history
    assert len(history) == len(plain.history) == SETTINGS.updates
    names = ["learning_rate", "conflicts", *(f"{kind}/{task}" for kind in ("loss", "weight") for task in TASKS)]
    for row, expected in zip(history, plain.history, strict=True):
        for name in names:
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name
    assert [row["learning_rate"] for row in plain.history[:3]] == [0, 1.5e-3, 3e-3]


@pytest.mark.parametrize(("name", "share"), [("accelerate", 2 / 3), ("huggingface", 1.0), ("lightning", 2 / 3)])
def test_epoch_ends_with_fewer_micro_batches(name, share, tmp_path, monkeypatch):
    """Two of three: the trainer steps nevertheless, and divides by two or by three, as it does with one loss."""
    rows = len(Digits(SETTINGS)) - SETTINGS.batch
    monkeypatch.setattr(Digits, "__len__", lambda data: rows)
    history = example(name).train(SETTINGS, tmp_path, False).history
    assert len(history) == SETTINGS.updates
    for last in (3, 7):
        for task in TASKS:
            assert history[last][f"loss/{task}"] == pytest.approx(share * history[last - 1][f"loss/{task}"], rel=0.05)


@pytest.mark.parametrize("name", ["plain", *TRAINERS])
def test_resumed_training_has_the_same_bits(name, tmp_path):
    # A method with a state of its own, beside the state of Adam and of the schedule.
    settings = Settings(**vars(SETTINGS) | {"method": "gradvac", "updates": 6})
    torch.manual_seed(0)
    whole = example(name).train(settings, tmp_path, False)
    torch.manual_seed(1)
    resumed = example(name).train(settings, tmp_path, True)
    assert all(map(torch.equal, parameters(whole), parameters(resumed)))
    rows = [{k: v for k, v in row.items() if "/" in k} for row in whole.history[3:]]
    assert [{k: v for k, v in row.items() if "/" in k} for row in resumed.history[-3:]] == rows


@pytest.mark.parametrize("name", ["plain", *TRAINERS])
def test_example_prints_its_table(name):
    printed = main(example(name).train, "", ["--updates", "4", "--batch", "4", "--parts", "2", "--warmup", "1"])
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| left", "| right"]
    assert "4 updates" in printed
    assert "the same bits" in printed


def test_two_processes_are_one(plain):
    """Accelerate with DistributedDataParallel: every process has half of each micro-batch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "trainer_accelerate.py")]
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SETTINGS).items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    alone = main(trainer_plain.train, "", settings)
    assert done.stdout.strip() == alone.strip()


def train_on_rank(name: str, folder: str) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Trains on one of several ranks, each with its share of every micro-batch."""
    module, group = example(name), torch.distributed.group.WORLD
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": 0}.items():
            patch.setenv(key, str(value))  # what a launcher sets
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setattr(module, "optimizer_of", lambda net, settings: optimizer_of(net, settings, process_group=group))
        options: dict[str, Any] = {}
        if name == "lightning":

            def loader(data: Digits, settings: Settings) -> DataLoader:
                return DataLoader(data, settings.batch, sampler=DistributedSampler(data, shuffle=False))

            patch.setattr(Digits, "loader", loader)
            options = {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": False}
        digits = Digits(SETTINGS)
        patch.setattr(module, "Digits", lambda settings: digits)
        result = module.train(Settings(**vars(SETTINGS) | {"batch": SETTINGS.batch // ranks}), Path(folder), False, **options)
    return parameters(result), result.history


@pytest.mark.slow
@pytest.mark.parametrize("name", ["huggingface", "lightning"])
def test_two_ranks_are_one_process(workers, plain, tmp_path, name):
    done = workers.run(2, train_on_rank, name, str(tmp_path), timeout=120)
    for params, _ in done:
        for actual, expected in zip(params, parameters(plain), strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)
    history = done[0][1]
    assert len(history) == SETTINGS.updates
    assert history[0]["loss/left"] == pytest.approx(plain.history[0]["loss/left"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_in_16_bit(plain, tmp_path, precision):
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    result = example("lightning").train(SETTINGS, tmp_path, False, **options)
    moved = torch.cat([(p - q).flatten() for p, q in zip(parameters(plain), Net(SETTINGS.seed).parameters(), strict=True)])
    off = torch.cat([(p - q).flatten() for p, q in zip(parameters(result), parameters(plain), strict=True)])
    assert 0 < off.norm() / moved.norm() < 0.1  # which way Adam goes is lost where a gradient is within its rounding
    for row, expected in zip(result.history, plain.history, strict=True):
        assert row["loss/left"] == pytest.approx(expected["loss/left"], rel=2e-2)  # unscaled
    if precision == "16-mixed":
        assert scaler.get_scale() == 2.0**10


def test_huggingface_in_bfloat16_evaluates_and_wraps_its_own_optimizer(tmp_path):
    module = example("huggingface")
    trainer = module.trainer_of(SETTINGS, tmp_path)
    trainer.args.weight_decay, trainer.args.bf16 = 0.02, True
    trainer.optimizer = None
    adamw = trainer.create_optimizer()
    trainer.optimizer = mtl.MultiTaskOptimizer(adamw, "upgrad", shared=trainer.model.trunk.parameters(), tasks=TASKS)
    trainer.train()
    assert sorted({group["weight_decay"] for group in adamw.param_groups}) == [0.0, 0.02]
    assert len(adamw.state) == len(list(trainer.model.parameters()))

    trainer.eval_dataset = trainer.train_dataset
    logs = trainer.evaluate()
    with torch.no_grad():
        losses = trainer.model(**trainer.train_dataset[slice(0, len(trainer.train_dataset))])["losses"]
    assert logs["eval_loss"] == pytest.approx(float(sum(losses.values())), rel=1e-2)
    assert not any(name.startswith("loss/") for name in logs)


def test_huggingface_logs_means_of_several_updates(plain, tmp_path):
    trainer = example("huggingface").trainer_of(SETTINGS, tmp_path)
    trainer.args.logging_steps = 4
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row, part in zip(rows, (plain.history[:4], plain.history[4:]), strict=True):
        for task in TASKS:
            assert row[f"loss/{task}"] == pytest.approx(sum(one[f"loss/{task}"] for one in part) / 4, rel=2e-3)
        assert row["loss"] == pytest.approx(sum(row[f"loss/{task}"] for task in TASKS), rel=1e-3)
    assert all(row["grad_norm"] > SETTINGS.max_norm for row in rows)  # before clipping, which so does something


def test_huggingface_without_a_multitask_optimizer_says_so(tmp_path):
    trainer = example("huggingface").trainer_of(SETTINGS, tmp_path)
    trainer.optimizer = None
    with pytest.raises(ValueError, match="optimizer is a AdamW, which has no backward"):
        trainer.train()


def test_lightning_refuses_a_batch_without_losses(tmp_path):
    module = example("lightning")

    class Skips(module.Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    original, module.Module = module.Module, Skips
    try:
        with pytest.raises(ValueError, match="losses is a NoneType"):
            module.train(SETTINGS, tmp_path, False)
    finally:
        module.Module = original


def test_fabric_wraps_the_optimizer(plain):
    import lightning

    fabric, net = lightning.Fabric(accelerator="cpu", devices=1), Net(SETTINGS.seed)
    model, optimizer = fabric.setup(net, optimizer_of(net, SETTINGS))
    before = [p.clone() for p in net.parameters()]
    data = Digits(SETTINGS)
    for factor in (float("nan"), 1.0):  # what the first update knows about itself has to reach the step
        losses = model(**data[slice(0, 8)])["losses"]
        fabric.backward(joint_loss(optimizer, {task: loss * factor for task, loss in losses.items()}))
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.equal, net.parameters(), before)) == (factor != 1)
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_package_needs_no_trainer():
    code = "import sys, mtlkernels; print({'transformers', 'accelerate', 'lightning', 'peft'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
