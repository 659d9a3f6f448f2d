# SPDX-License-Identifier: Apache-2.0
"""The command line: `fastattn` or `python -m fastattn`.

Calls `info`, `_selftest.py`, the benchmark in `bench/`, the models' commands in
`models/_command.py` or that of maps in `maps/_command.py`, which declare their own options.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import fastattn
from fastattn import _core


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status.

    Parameters
    ----------
    arguments : list of str, optional
        Instead of those of the process.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Who started the process has closed it: it is empty.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for good
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(arguments: list[str]) -> int:
    """Run a command; import what it needs, and no more."""
    from fastattn.maps import _command as _map_command
    from fastattn.models import _command

    parser = argparse.ArgumentParser("fastattn", description=fastattn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="describe this installation and this machine")
    commands.add_parser("selftest", help="check every kernel that this CPU can run, in a minute")
    measure = commands.add_parser("bench", help="measure it beside other libraries")
    _command.add_commands(commands)
    _map_command.add_command(commands)
    if arguments[:1] == ["bench"]:
        from fastattn import bench

        bench.add_arguments(measure)
    options = parser.parse_args(arguments)
    try:
        _core.isa()
    except (RuntimeError, ValueError) as error:  # FASTATTN_ISA is wrong, or not for this CPU
        parser.exit(2, f"fastattn: error: {error}\n")
    if options.command == "info":
        print(fastattn.info())  # noqa: T201
        return 0
    if options.command == "selftest":
        from fastattn import _selftest

        return _selftest.main()
    return bench.main(options) if options.command == "bench" else _command.main(options)


if __name__ == "__main__":
    sys.exit(main())
