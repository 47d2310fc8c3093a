"""``python -m mtlkernels plan``: what it prints and refuses, and that its facts are those of the code."""

import json
import math
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ptxsim.roofline import CHIPS

from mtlkernels.__main__ import main
from mtlkernels.distributed import Replicated
from mtlkernels.hardware import GPUS
from mtlkernels.planner import MODES, Plan, Setting, Step, plan, plans
from mtlkernels.planner.command import transformer
from mtlkernels.planner.step import BUCKET, ONE_READ_TASKS, TABLE_BYTES

ROOT = Path(__file__).parent.parent
SMALL = ["--params", "1e6", "--tasks", "3", "--layers", "2", "--tokens", "64"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    return json.loads(printed(capsys, *arguments, "--json"))


# --- facts of the code --------------------------------------------------------------------------------------------------------


def test_one_table_of_gpus():
    """That by which tests/ptxsim bounds the kernels has the same chips, as fast."""
    assert {name: (gpu.title, gpu.bandwidth) for name, gpu in GPUS.items()} == {
        name: (chip.name, 1e9 * chip.dram_gbs) for name, chip in CHIPS.items()
    }


def test_constants_are_those_of_the_code():
    header = (ROOT / "csrc/common/launch_plan.h").read_text()
    arguments, other, head = (
        int(re.search(rf"constexpr int {name} = (\d+);", header)[1])
        for name in ("kArgumentBytes", "kOtherArguments", "kTableHeader")
    )
    assert (arguments - other - head) // 8 * 8 - 4 == TABLE_BYTES
    assert f"kGramCombineTasks = {ONE_READ_TASKS};" in (ROOT / "csrc/common/gram_combine_plan.h").read_text()
    assert BUCKET == Replicated.BUCKET


@pytest.mark.parametrize("params", [1e6, 1.3e8, 7e9])
@pytest.mark.parametrize("layers", [1, 12, 80])
def test_the_transformer_has_the_parameters_asked_for(params, layers):
    blocks = transformer(params, layers)
    assert len(blocks) == layers
    found = sum(math.prod(shape) for block in blocks for shape in block)
    width = blocks[0][0][0]
    assert abs(found - params) <= layers * (12 * width + 13)  # of half a unit of width


# --- plans --------------------------------------------------------------------------------------------------------------------


def setting(**options) -> Setting:
    own = Setting(transformer(1e6, 2), [[(10, 204)]] * 3, tokens=64, width=204)
    return replace(own, **options)


def test_ddp_sends_what_its_document_says():
    """(n - 1) / n ((K + 1) P + 2 Q) bytes of docs/distributed.md, and 2 (n - 1) / n 8 (2 K^2 + K) that decide."""
    own, n, k = setting(gpus=16, sharding="ddp"), 16, 3
    shared, heads = own.padded(own.shared), own.padded(own.own)
    expected = (n - 1) / n * ((k + 1) * shared + 2 * heads + 2 * 8 * (2 * k * k + k))
    assert plan(own, "stored").sent == pytest.approx(expected, rel=1e-12)


def test_fsdp_sends_what_k_backward_passes_do():
    own, n = setting(gpus=8, sharding="fsdp", heads=[[]] * 3), 8
    expected = (n - 1) / n * ((1 + 2 * 3) * own.padded(own.shared) + 2 * 8 * (9 + 3))
    assert plan(own, "stored").sent == pytest.approx(expected, rel=1e-12)


def test_update_every_is_the_mean_of_its_steps():
    first, between = plan(setting(), "stored"), Step(setting())
    MODES["update_every"].between(between)

    mean = plan(setting(update_every=4), "update_every")

    for name in ("flops", "moved", "stepped", "launches"):
        assert getattr(mean, name) == pytest.approx((getattr(first, name) + 3 * getattr(between, name)) / 4)
    assert mean.peak == first.peak
    assert plan(setting(update_every=1), "update_every") == replace(first, mode="update_every")


def test_a_mode_that_is_ruled_out():
    with pytest.raises(ValueError, match="mode is 'streamed', which 'fsdp' rules out"):
        plan(setting(gpus=8, sharding="fsdp"), "streamed")
    with pytest.raises(ValueError, match="'master' rules out"):
        plan(setting(master=True), "stored, fused")
    assert [own.mode for own in plans(setting())] == list(MODES)


def test_the_bound_is_the_busiest_resource():
    gpu = GPUS["H100"]._replace(half_flops=100.0, float_flops=50.0, bandwidth=10.0, node_link=4.0, network=1.0, host_link=2.0)
    own = Plan("stored", 1000.0, 30.0, 20.0, 14.0, 1.0, {}, 80.0, 0.0)
    assert own.times(setting(gpus=8), gpu, 8) == {"compute": 10.0, "memory": 5.0, "network": 20.0, "host": 7.0}
    assert own.times(setting(gpus=8, element=4), gpu, 8)["compute"] == 20.0
    assert own.times(setting(gpus=8), gpu, 2)["network"] == 40.0  # two ports a node
    assert own.times(setting(gpus=16), gpu, 8)["network"] == 20.0  # eight, more than the links within it


def test_more_of_everything():
    """What each argument is for moves what it should."""
    base = setting()
    assert plan(setting(tokens=128), "stored").flops == 2 * plan(base, "stored").flops
    assert plan(setting(optimizer="sgd"), "stored").stepped == 3 / 7 * plan(base, "stored").stepped
    long = setting(tokens=4096)
    assert plan(replace(long, checkpointing=True), "stored").peak < plan(long, "stored").peak
    assert plan(setting(activation_bytes=1e9), "stored").peak > 1e9
    assert plan(setting(sub_batch=0.5), "sub-batch").flops > plan(base, "sub-batch").flops
    assert plan(setting(gpus=8, sharding="fsdp"), "stored").peak < plan(base, "stored").peak
    assert plan(setting(master=True), "stored").peak > 1.5 * plan(base, "stored").peak


# --- the command --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharding", "refused"), [("fsdp", {"streamed", "representation"}), ("ddp", {"stored, fused"})])
def test_a_line_for_every_mode(capsys, sharding, refused):
    refused |= {"bfloat16", "host", "online"}
    text = printed(capsys, *SMALL, "--gpus", "64", "--sharding", sharding)
    table = text.split("\n\n")[1]

    assert [line.split("  ")[0] for line in table.splitlines()] == ["mode", *(name for name in MODES if name not in refused)]
    for name in refused:
        assert f"{name} (with {sharding})" in text
    assert "lower bounds, nothing measured" in text
    assert "datasheet: 989 TFLOP/s" in text


def test_json_has_what_the_table_has(capsys):
    arguments = [*SMALL, "--tokens", "4096", "--gpus", "8", "--gpu", "a100", "--head-params", "100"]
    found = record(capsys, *arguments)
    text = printed(capsys, *arguments)

    assert found["gpu"]["title"] == "A100-80GB SXM"
    for line in found["assumptions"]:
        assert line in text
    for mode in found["modes"]:
        times = mode["seconds"]
        assert mode["at_least"] == times["compute"] + times["memory"] > max(times["network"], times["host"])
        assert mode["bound_by"] == "compute"
        (row,) = [line for line in text.splitlines() if re.match(rf"{re.escape(mode['mode'])}  +\d", line)]
        assert f"{1e3 * mode['at_least']:.4g} (" in row
        assert f" {sum(kind['count'] for kind in mode['collectives']):g} " in row
        assert mode["fits"]
        assert "too much" not in row
    assert asdict(plan(setting(), "stored")).keys() - {"collectives"} <= found["modes"][0].keys()


def test_what_does_not_fit_is_marked(capsys):
    text = printed(capsys, "--params", "7e9", "--tasks", "8", "--gpu", "h200")
    marked = {line.split("  ")[0] for line in text.splitlines() if " too much " in line}
    assert marked == {"stored", "stored, fused", "previous", "bfloat16", "sub-batch", "update_every"}  # of 16 bits already


def test_on_a_terminal_rich_prints_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    fancy = printed(capsys, *SMALL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = printed(capsys, *SMALL)

    assert "─" in fancy
    assert "─" not in plain
    for name in MODES:
        assert name in fancy
        assert name in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "7e9"], "--tasks"),
        (["--params", "x", "--tasks", "2"], "--params: invalid number value: 'x'"),
        (["--params", "nan", "--tasks", "2"], "--params: nan is not a number of 0 or more"),
        (["--params", "10", "--tasks", "2"], "--params: 10 parameters do not make 32 blocks; pass --layers"),
        (["--params", "7e9", "--tasks", "0"], "--tasks: 0 is not a whole number of 1 or more"),
        (["--params", "7e9", "--tasks", "2.5"], "--tasks: 2.5 is not a whole number"),
        (["--params", "7e9", "--tasks", "2", "--gpus", "inf"], "--gpus: inf is not a number"),
        (["--params", "7e9", "--tasks", "2", "--gpu", "v100"], "--gpu: v100 is unknown; pass one of A100, H100"),
        (["--params", "7e9", "--tasks", "2", "--dtype", "int8"], "--dtype: int8 is unknown; pass one of bfloat16"),
        (["--params", "7e9", "--tasks", "2", "--sub-batch", "1.5"], "--sub-batch: 1.5 is not a part of the batch"),
        (["--params", "7e9", "--tasks", "2", "--dtype", "fp32", "--master-weights"], "--master-weights: the parameters are"),
        (["--params", "7e9", "--tasks", "2", "--checkpointing", "--activation-bytes", "1"], "--checkpointing: --activation-"),
    ],
)
def test_bad_input(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_document_has_what_the_commands_print(capsys):
    text = (ROOT / "docs/planner.md").read_text()
    blocks = re.findall(r"^```\n\$ python -m mtlkernels plan (.*)\n([\s\S]*?)\n```$", text, re.MULTILINE)
    assert len(blocks) == 2
    for arguments, output in blocks:
        assert printed(capsys, *shlex.split(arguments)).rstrip("\n") == output
