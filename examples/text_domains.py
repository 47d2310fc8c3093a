"""Bytes of several kinds of text from what is installed beside torch: one loss for each makes a language model multi-task.

| domain | from | documents |
|---|---|---|
| ``python`` | the sources of Python's own library (package ``python``) | a module each |
| ``headers`` | the C++ headers of ATen, c10 and torch/csrc (package ``torch``) | a header each |
| ``topics`` | the language reference as ``help()`` prints it, pydoc_data/topics.py (package ``python``) | a topic each |
| ``smiles`` | the molecules of QM9 as SMILES (package ``qm9pack``) | a molecule each |

Nothing is downloaded. Other versions of the packages have other texts, so figures compare within one environment only.

    python examples/text_domains.py    prints what there is
"""

import hashlib
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from mtlkernels.tabular import package_file, read_columns

END = b"\0"
"""After each document."""
TEST_SHARE = 10
"""One document of so many is in the test part."""
LEAST = 10_000
"""Bytes that a part has at least."""
MOST = 10_000
"""Bytes of a document that are taken: some generated headers are as long as all others."""


@dataclass(frozen=True)
class Text:
    """One domain, its documents one after the other, each followed by a zero byte."""

    train: Tensor
    """uint8 [N]."""
    test: Tensor
    """uint8 [M], of other documents: no document, nor a copy of one under another name, is in both parts."""
    train_documents: tuple[str, ...]
    test_documents: tuple[str, ...]


def python_sources() -> Iterator[tuple[str, bytes]]:
    """Python's library without tests, tables of encodings and the topics, which are a domain of their own."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    return _files(Path(sysconfig.get_paths()["stdlib"]), ("",), ".py", left_out)


def headers() -> Iterator[tuple[str, bytes]]:
    """torch's headers without ATen/ops, thousands of generated files that are alike."""
    return _files(Path(torch.__file__).parent / "include", ("ATen", "c10", "torch/csrc"), ".h", {"ops"})


def topics() -> Iterator[tuple[str, bytes]]:
    for name, text in import_module("pydoc_data.topics").topics.items():
        yield name, text.encode()


def smiles() -> Iterator[tuple[str, bytes]]:
    for part in (1, 2, 3):
        path = package_file("qm9pack", f"data/qm9_part{part}.csv", "the domain smiles of examples/text_domains.py")
        for index, text in read_columns(path, ("Index", "SMILES")):
            yield index, text.encode()


DOMAINS: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "python": python_sources,
    "headers": headers,
    "topics": topics,
    "smiles": smiles,
}
"""Domain -> its documents, names and contents, in the same order every time."""
DEFAULT = ("python", "headers", "topics")


def domains(names: Sequence[str] = DEFAULT, max_bytes: int = 1_000_000) -> dict[str, Text]:
    """The bytes of each domain, split by document into a training and a test part.

    Which part a document is in depends on its name alone, so that it is in the same one for every ``max_bytes``.

    Args:
        names: which domains, of ``DOMAINS``.
        max_bytes: the most that a training part has; a test part has at most a tenth of that.

    Returns:
        {name: :class:`Text`}, in the order of the names.

    Raises:
        ValueError: an unknown domain, one named twice, fewer ``max_bytes`` than ten times ``LEAST``, or a domain of which less
            than ``LEAST`` bytes of a part are there.
        MissingPackageError: the package of a domain is not installed.
    """
    unknown = [name for name in names if name not in DOMAINS]
    if unknown:
        raise ValueError(f"names[{list(names).index(unknown[0])}] is {unknown[0]!r}; pass some of {', '.join(DOMAINS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names is {list(names)}; pass one or more domains, each once.")
    if max_bytes < TEST_SHARE * LEAST:
        raise ValueError(f"max_bytes is {max_bytes}; pass {TEST_SHARE * LEAST} or more, for test parts of {LEAST}.")
    return {name: _split(name, DOMAINS[name](), max_bytes) for name in names}


def _split(domain: str, documents: Iterable[tuple[str, bytes]], max_bytes: int) -> Text:
    limits = {"train": max_bytes, "test": max_bytes // TEST_SHARE}
    texts = {part: bytearray() for part in limits}
    names: dict[str, list[str]] = {part: [] for part in limits}
    seen: set[bytes] = set()
    for name, content in documents:
        part = "train" if _number(name) % TEST_SHARE else "test"
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen and len(texts[part]) < limits[part]:
            seen.add(digest)
            texts[part] += content[:MOST] + END
            names[part].append(name)
        if all(len(texts[part]) >= limit for part, limit in limits.items()):
            break
    for part, text in texts.items():
        if len(text) < LEAST:
            raise ValueError(
                f"the {part} part of the domain {domain} has {len(text)} bytes, fewer than {LEAST}; its package comes without "
                f"texts here. Leave {domain} out, or install the package with its sources."
            )
    train, test = (torch.frombuffer(texts[part][: limits[part]], dtype=torch.uint8).clone() for part in limits)
    return Text(train, test, tuple(names["train"]), tuple(names["test"]))


def _files(root: Path, folders: Sequence[str], suffix: str, left_out: set[str]) -> Iterator[tuple[str, bytes]]:
    """Of the folders in ``root`` and those in them, but for folders ``left_out``; in an order that mixes folders."""
    found = []
    for top in folders:
        for folder, inner, files in os.walk(root / top):
            inner[:] = [name for name in inner if name not in left_out]
            found += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(suffix)]
    for name in sorted(found, key=lambda name: (_number(name), name)):
        yield name, (root / name).read_bytes()


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def main() -> None:
    for name in DOMAINS:
        try:
            text = domains([name])[name]
        except (ImportError, ValueError) as error:
            print(f"{name:8s} {error}")
            continue
        sizes = f"train {len(text.train):9,} bytes of {len(text.train_documents):6,} documents"
        print(f"{name:8s} {sizes}, test {len(text.test):8,} of {len(text.test_documents):5,}")


if __name__ == "__main__":
    main()
