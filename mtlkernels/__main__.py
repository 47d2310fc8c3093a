"""``python -m mtlkernels info | demo``."""

import argparse
import sys
from collections.abc import Sequence

from ._optional import MissingPackageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its module is imported only then, so that ``info`` works where the packages of others are missing."""
    parser = argparse.ArgumentParser(prog="python -m mtlkernels", description="Fused kernels for multi-task gradient work.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, libraries, backends of each op, and why something is missing", add_help=False)
    commands.add_parser("demo", help="two-task training on real digits: a table and a picture", add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        if command == "info":
            from . import info

            return info.main(arguments[1:])
        from . import demo

        return demo.main(arguments[1:])
    except MissingPackageError as error:
        print(f"python -m mtlkernels {command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
