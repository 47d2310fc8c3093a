"""A byte-level language model on several kinds of text, one loss each, sharded over the ranks: a training script to copy.

FSDP2 with bfloat16 mixed precision, gradient accumulation by domain, warm-up and cosine, clipping, bits per byte of unseen
documents, and checkpoints from which the same command goes on: a run that was killed ends as one that was not, to the bit.

    torchrun --nproc-per-node 2 examples/language_model.py --method pcgrad --folder build/pcgrad
    python examples/language_model.py --method famo        one process, the same result up to rounding

``--method plain`` has no line of mtlkernels in its step: the mean of the losses, AdamW. examples/language_model_table.py
compares the methods. Ranks communicate by gloo on CPUs and by NCCL on GPUs; no run has used the latter.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from text_domains import DEFAULT, DOMAINS, Text, domains  # the example beside this one
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import mtlkernels as mtl

WEIGHTINGS: dict[str, Callable[[torch.Generator], mtl.Weighting]] = {
    "mean": lambda _: mtl.Mean(),
    "pcgrad": lambda generator: mtl.PCGrad(generator=generator),
    "cagrad": lambda _: mtl.CAGrad(c=0.4),
    "famo": lambda _: mtl.FAMO(),
}
"""The generator of a random one is part of its state, and so of the checkpoint."""
METHODS = ("plain", *WEIGHTINGS)
SUMS = ("pcgrad",)
"""Methods whose update is as long as the domains' gradients together, where that of the others is as long as their mean."""
KEPT = 2
"""Checkpoints that stay; one that was not completed does not count."""


@dataclass(frozen=True)
class Config:
    """What a run is, but for where it is kept."""

    method: str = "pcgrad"
    per: str = "model"
    domains: tuple[str, ...] = DEFAULT
    seed: int = 0
    steps: int = 96
    warmup: int = 10
    lr: float = 3e-3
    weight_decay: float = 0.1
    max_norm: float = 1.0
    batch: int = 16
    micro_batches: int = 2
    context: int = 128
    width: int = 96
    layers: int = 3
    heads: int = 2
    precision: str = "bfloat16"
    max_bytes: int = 1_000_000
    eval_every: int = 8
    eval_rows: int = 64
    save_every: int = 16

    def check(self, ranks: int) -> None:
        """Raises a ``ValueError`` for values that do not fit each other or the number of ranks."""
        for name in ("steps", "batch", "micro_batches", "context", "width", "layers", "heads", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass 1 or more.")
        if self.method == "plain" and self.per != "model":
            raise ValueError(f"per is {self.per!r}, and plain AdamW has no weights; pass per='model', or another method.")
        for name, value, parts in (
            ("batch", self.batch, ranks * self.micro_batches),
            ("eval_rows", self.eval_rows, ranks),
            ("width", self.width, self.heads),
        ):
            if value < parts or value % parts:
                raise ValueError(f"{name} is {value}, which {parts} equal parts are to be made of; pass a multiple of {parts}.")


# --- model --------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention to what came before, and a layer of four times the width; a norm before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp_norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class ByteModel(nn.Module):
    """A transformer over bytes. All parameters are shared by all domains."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, config.width), nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(config.width), nn.Linear(config.width, 256, bias=False)
        for name, param in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.layers))
            elif param.dim() == 2:
                nn.init.normal_(param, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, rows: Tensor) -> Tensor:
        """The mean cross-entropy in nats of each byte given those before it in its row; uint8 [B, T + 1]."""
        rows = rows.long()
        x = self.embed(rows[:, :-1]) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), rows[:, 1:].flatten())


def sharded(config: Config, mesh: Any) -> ByteModel:
    """Parameters, their gradients' sums and the optimizer's state in float32, the passes in ``precision``."""
    torch.manual_seed(config.seed)
    model = ByteModel(config).to(mesh.device_type)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


# --- data ---------------------------------------------------------------------------------------------------------------------


class Stream:
    """Rows of each domain, in an order drawn anew for every pass over it. Its state is how many rows it has given of each."""

    def __init__(self, texts: Mapping[str, Text], length: int, seed: int) -> None:
        self.rows = {name: in_rows(text.train, length) for name, text in texts.items()}
        self.seed, self.taken = seed, 0
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def take(self, count: int, rank: int, ranks: int) -> dict[str, Tensor]:
        """This rank's share of the next ``count`` rows of each domain, uint8 [count / ranks, length]."""
        numbers = range(self.taken + rank, self.taken + count, ranks)
        self.taken += count
        return {name: rows[[self._place(k, n, len(rows)) for n in numbers]] for k, (name, rows) in enumerate(self.rows.items())}

    def _place(self, domain: int, number: int, size: int) -> int:
        passed, within = divmod(number, size)
        if self._orders.get(domain, (-1,))[0] != passed:
            generator = torch.Generator().manual_seed((self.seed * 10_000 + passed) * len(self.rows) + domain)
            self._orders[domain] = passed, torch.randperm(size, generator=generator)
        return int(self._orders[domain][1][within])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.taken = state["taken"]


def in_rows(text: Tensor, length: int) -> Tensor:
    """[N] -> [N // length, length]."""
    return text[: len(text) // length * length].view(-1, length)


# --- training -----------------------------------------------------------------------------------------------------------------


class Trainer:
    """One run on the ranks of this world, at the start or where its last checkpoint in ``folder`` was written."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config, self.folder = config, folder
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        config.check(self.ranks)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        texts = domains(config.domains, config.max_bytes)
        self.stream = Stream(texts, config.context + 1, config.seed)
        self.held_out = {name: self._share(in_rows(text.test, config.context + 1)) for name, text in texts.items()}
        self.model = sharded(config, init_device_mesh(self.device.type, (self.ranks,)))
        self.params = list(self.model.parameters())
        decay = [{"params": [p for p in self.params if p.dim() == 2]}]
        inner = torch.optim.AdamW(
            [*decay, {"params": [p for p in self.params if p.dim() != 2], "weight_decay": 0.0}],
            config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizer: torch.optim.Optimizer = inner
        if config.method != "plain":
            clipped = config.max_norm * (len(config.domains) if config.method in SUMS else 1)
            self.optimizer = mtl.MultiTaskOptimizer(
                inner,
                WEIGHTINGS[config.method](torch.Generator().manual_seed(config.seed)),
                shared=self.params,
                tasks=config.domains,
                per=config.per,  # type: ignore[arg-type]
                max_norm=clipped,
            )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(warmup_cosine, config=config))
        self.step_number, self.seconds = 0, 0.0
        self.lines: list[dict[str, Any]] = []
        if folder is not None:
            self._resume(folder)

    def _share(self, rows: Tensor) -> Tensor:
        """This rank's part of ``eval_rows`` rows, spread over a test part."""
        count = self.config.eval_rows
        if len(rows) < count:
            raise ValueError(f"eval_rows is {count}, and a test part has {len(rows)} rows of that length; pass fewer.")
        return rows[[n * len(rows) // count for n in range(self.rank, count, self.ranks)]]

    def loss(self, rows: Tensor) -> Tensor:
        return self.model(rows.to(self.device))

    def train(self) -> dict[str, float]:
        """Runs to the end; the bits per byte of each domain there."""
        config = self.config
        if self.step_number == 0 and not self.lines:
            self._log(bits=self.evaluate())
        while self.step_number < config.steps:
            start = time.process_time()  # without the time that other processes of the machine take
            told = self.step()
            self.seconds += time.process_time() - start
            self._log(**told)
            if self.step_number % config.eval_every == 0 or self.step_number == config.steps:
                self.lines[-1]["bits"] = self.evaluate()
            if self.folder is not None and (self.step_number % config.save_every == 0 or self.step_number == config.steps):
                self._save(self.folder)
        return self.lines[-1]["bits"]

    def step(self) -> dict[str, Any]:
        """One step; tensors of the losses, the update's norm and the share of pairs of domains in conflict."""
        config, optimizer = self.config, self.optimizer
        batch = self.stream.take(config.batch, self.rank, self.ranks)
        parts = {name: rows.chunk(config.micro_batches) for name, rows in batch.items()}
        if not isinstance(optimizer, mtl.MultiTaskOptimizer):
            told = self._plain_step(parts)
        elif optimizer.weighting.loss_only:
            told = self._told(optimizer.step(lambda: {name: self._mean_loss(own) for name, own in parts.items()}))
        else:
            # A domain at a time, so that no graph is there but that of one micro-batch of one domain.
            *rest, (last, rows) = [(name, own[m]) for m in range(config.micro_batches) for name, own in parts.items()]
            for name, own in rest:
                optimizer.accumulate({name: self.loss(own) / config.micro_batches})
            told = self._told(optimizer.step({last: self.loss(rows) / config.micro_batches}))
        self.schedule.step()
        self.step_number += 1
        return told

    def _mean_loss(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.loss(rows) for rows in parts]).mean()

    @staticmethod
    def _told(info: mtl.StepInfo) -> dict[str, Any]:
        return {"losses": info.losses, "norm": info.norm, "conflicts": info.conflicts}

    def _plain_step(self, parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """The mean over the domains, accumulated in the same parts."""
        self.optimizer.zero_grad()
        losses = []
        for own in parts.values():
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for rows in own:
                loss = self.loss(rows) / len(own)
                (loss / len(parts)).backward()
                total += loss.detach()
            losses.append(total)
        norm = nn.utils.clip_grad_norm_(self.params, self.config.max_norm)
        self.optimizer.step()
        return {"losses": self._mean(torch.stack(losses)), "norm": norm.full_tensor(), "conflicts": None}

    def _mean(self, values: Tensor) -> Tensor:
        """Over the ranks."""
        dist.all_reduce(values)
        return values / self.ranks

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Bits per byte of the test part of each domain."""
        self.model.eval()
        share = self.config.eval_rows // self.ranks
        parts = {name: rows.split(min(share, 16)) for name, rows in self.held_out.items()}
        nats = [torch.stack([self.loss(part).double() * len(part) for part in own]).sum() / share for own in parts.values()]
        self.model.train()
        return dict(zip(parts, (self._mean(torch.stack(nats)) / math.log(2)).tolist(), strict=True))

    # --- checkpoints and the log --------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "stream": self.stream, "schedule": self.schedule}
        if isinstance(self.optimizer, mtl.MultiTaskOptimizer):
            state["own"] = self.optimizer.own_state  # of the weighting: FAMO's weights, PCGrad's generator
        return state

    def _save(self, folder: Path) -> None:
        """The log first, whose lines past a checkpoint do no harm; a checkpoint's last file says that it is complete."""
        for line in self.lines:
            line.update({name: value.tolist() for name, value in line.items() if isinstance(value, Tensor)})
        if self.rank == 0:
            write_lines(folder / "log.jsonl", self.lines)
        dcp.save(self._state(), checkpoint_id=folder / f"step-{self.step_number:07d}")
        if self.rank == 0:
            for old in checkpoints(folder)[:-KEPT]:
                shutil.rmtree(old)

    def _resume(self, folder: Path) -> None:
        own = json.loads(json.dumps(asdict(self.config)))  # as it is read back
        found: list[Any] = [None]
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path, done = folder / "config.json", checkpoints(folder)
            if not path.exists():
                write_lines(path, [own])
            lines = read_lines(folder / "log.jsonl") if done else []
            found = [(json.loads(path.read_text()), done[-1] if done else None, lines)]
        dist.broadcast_object_list(found)  # so that all go on from the same one
        before, checkpoint, lines = found[0]
        differ = [name for name in own if before.get(name) != own[name]]
        if differ:
            name = differ[0]
            raise ValueError(f"{folder} has a run with {name}={before.get(name)}, not {own[name]}; pass another folder.")
        if checkpoint is None:
            return
        state = self._state()
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step_number = int(checkpoint.name.removeprefix("step-"))
        self.lines = [line for line in lines if line["step"] <= self.step_number]
        self.seconds = self.lines[-1]["seconds"]

    def _log(self, **told: Any) -> None:
        """Keeps tensors as they are: the host waits for them when a checkpoint is written."""
        self.lines.append({"step": self.step_number, "seconds": self.seconds, **told})


def warmup_cosine(step: int, config: Config) -> float:
    """Factor of the learning rate: linear to 1, then half a cosine to a tenth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))


def checkpoints(folder: Path) -> list[Path]:
    """Those that were completed, the newest last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once, so that it is never half written."""
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- command ------------------------------------------------------------------------------------------------------------------


def start_process_group() -> None:
    """The world of torchrun, or one of this process alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def parse(argv: Sequence[str] | None) -> tuple[Config, Path | None]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    choices = {"method": METHODS, "per": ("model", "tensor"), "domains": DOMAINS, "precision": ("bfloat16", "float32")}
    for field in fields(Config):
        many = {"nargs": "+", "type": str} if field.name == "domains" else {"type": type(field.default)}
        flag, default = "--" + field.name.replace("_", "-"), field.default
        parser.add_argument(flag, default=default, choices=choices.get(field.name), help=f"(default: {default})", **many)  # type: ignore[arg-type]
    parser.add_argument("--folder", type=Path, help="of checkpoints and log.jsonl, seen by all ranks; a run in it goes on")
    options = vars(parser.parse_args(argv))
    folder = options.pop("folder")
    return Config(**{**options, "domains": tuple(options["domains"])}), folder


def main(argv: Sequence[str] | None = None) -> int:
    config, folder = parse(argv)
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    start_process_group()
    try:
        trainer = Trainer(config, folder)
        started = trainer.step_number
        bits = trainer.train()
        if trainer.rank == 0:
            print(f"{config.method} per {config.per}, steps {started} to {config.steps}, bits per byte:", end=" ")
            print(", ".join(f"{name} {value:.3f}" for name, value in bits.items()), flush=True)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
