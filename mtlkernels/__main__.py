"""``python -m mtlkernels info | demo | bench | plan``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ._optional import MissingPackageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its module is imported only then, so that ``info`` works where the packages of others are missing."""
    parser = argparse.ArgumentParser(prog="python -m mtlkernels", description="Fused kernels for multi-task gradient work.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, libraries, backends of each op, and why something is missing", add_help=False)
    commands.add_parser("demo", help="two-task training on real digits: a table and a picture", add_help=False)
    commands.add_parser("bench", help="the CPU ops against other ways, in a checkout of the repository", add_help=False)
    commands.add_parser("plan", help="what a step takes on named GPUs, for every mode: by arithmetic", add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        if command == "info":
            from . import info

            return info.main(arguments[1:])
        if command == "bench":
            return _bench(arguments[1:])
        if command == "plan":
            from .planner import command as planner

            return planner.main(arguments[1:])
        from . import demo

        return demo.main(arguments[1:])
    except MissingPackageError as error:
        print(f"python -m mtlkernels {command}: {error}", file=sys.stderr)
        return 1


def _bench(arguments: Sequence[str]) -> int:
    """Runs the repository's benchmarks, which are no part of an installed package."""
    root = Path(__file__).parent.parent
    if not (root / "benchmarks/__main__.py").exists():
        print(
            f"python -m mtlkernels bench: there is no benchmarks folder beside {root / 'mtlkernels'}; run it in a checkout of "
            "the repository, `make bench`.",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(root))
    return int(importlib.import_module("benchmarks.__main__").main(arguments))


if __name__ == "__main__":
    sys.exit(main())
