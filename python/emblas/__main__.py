"""Command line: ``python -m emblas info``."""

from __future__ import annotations

import argparse
import json

from emblas._info import info, render


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m emblas", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser(
        "info", help="versions, instruction set, threads, backends of each op"
    )
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    facts = info()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))


if __name__ == "__main__":
    main()
