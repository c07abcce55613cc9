"""``torchfedrpc check HOST:PORT``: whether a worker or driver that listens can take part in a run from here."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from torchfedrpc.rpc.check import check
from torchfedrpc.rpc.handshake import TOKEN_VARIABLE, load_token
from torchfedrpc.run import cancel_end_report

_DESCRIPTION = """\
Check a worker that listens (torchfedrpc-worker --listen), or a driver at its runtime.join_at, from this machine:
name, port, token, versions, clocks, limit of open files, ephemeral ports in both directions, and modules of learners.
Prints a line for each. A worker may serve a run meanwhile.
"""


def main(arguments: Sequence[str]) -> int:
    """Print one line per finding.

    Returns:
        The exit status: 0 if a run can use both machines, 1 if not.

    Raises:
        ConfigError: If the address is malformed or the token file unusable.
    """
    cancel_end_report()  # this process does not run a rank's script, even if a launcher's variables are set
    parser = argparse.ArgumentParser("torchfedrpc check", description=_DESCRIPTION)
    parser.add_argument("address", metavar="HOST:PORT", help="where the worker or driver listens")
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"the token that driver and workers share (default: ${TOKEN_VARIABLE})"
    )
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="a module of learners; may be repeated"
    )
    options = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    return asyncio.run(_check(options.address, load_token(options.token_file), options.module))


async def _check(address: str, token: bytes, modules: Sequence[str]) -> int:
    status = 0
    async for finding in check(address, token, modules):
        print(f"{finding.mark:<5}{finding.name:<10}{finding.text}", flush=True)
        if finding.mark == "FAIL":
            status = 1
    return status
