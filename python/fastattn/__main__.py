# SPDX-License-Identifier: Apache-2.0
"""The command line: `fastattn` or `python -m fastattn`.

Calls `info`, `_selftest.py`, the benchmark in `bench/` or the models' commands in
`models/_command.py`, which declare their own options.
"""

from __future__ import annotations

import argparse
import sys

import fastattn
from fastattn import _selftest, bench
from fastattn.models import _command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status.

    Parameters
    ----------
    arguments : list of str, optional
        Instead of those of the process.
    """
    parser = argparse.ArgumentParser("fastattn", description=fastattn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="describe this installation and this machine")
    commands.add_parser("selftest", help="check every kernel that this CPU can run, in a minute")
    bench.add_arguments(commands.add_parser("bench", help="measure it beside other libraries"))
    _command.add_commands(commands)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(fastattn.info())  # noqa: T201
        return 0
    if options.command == "selftest":
        return _selftest.main()
    return bench.main(options) if options.command == "bench" else _command.main(options)


if __name__ == "__main__":
    sys.exit(main())
