"""The ``torchfedrpc-worker`` command: a worker on another machine that listens for drivers or joins one."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import worker
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import (
    TOKEN_VARIABLE,
    About,
    HandshakeError,
    UnreachableError,
    dial,
    load_token,
)
from torchfedrpc.rpc.interfaces import parse_address
from torchfedrpc.rpc.listening import listen
from torchfedrpc.run import cancel_end_report

_NAME = "torchfedrpc-worker"
_DIAL_TIMEOUT_S = 5.0
_RETRY_FOR_S = 10.0  # the driver may still be starting
_RETRY_S = 0.2

_EPILOG = """\
Learners' modules are found in the folder where the worker is started.

The port of --listen and --join is for the handshake, in which both ends prove that they have the same token and
compare versions, and for the control link. Heartbeats, calls and tensors travel on other ports, which the system
chooses, in both directions, and nothing is encrypted. So driver and workers have to reach each other on ports 32768
to 60999 (/proc/sys/net/ipv4/ip_local_port_range), on a trusted network. Sites behind NAT need an interface of a VPN,
such as WireGuard's, between them: listen on its address, and name it to the driver by runtime.interface=wg0.
torchfedrpc check HOST:PORT, on the other machine, tests all of this.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the command's name. None: Those of the process.

    Returns:
        The exit status: 0 if the run ended well or a signal asked the worker to leave; 1 if the driver to join is
        unreachable, refuses the worker, gives it up or ends its run early; 2 for a wrong setting; 128 plus the
        signal's number if a signal interrupted work.
    """
    parser = argparse.ArgumentParser(
        prog=_NAME,
        description="Serve learners on this machine for a driver on another one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="wait to be dialled, by one driver after another; port 0: any that is free",
    )
    way.add_argument("--join", metavar="HOST:PORT", help="dial a driver that is running")
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"the token that driver and workers share (default: ${TOKEN_VARIABLE})"
    )
    cancel_end_report()  # this process is not a rank, even if a launcher's variables are set
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=f"{_NAME}: %(message)s")
    sys.path.insert(0, os.getcwd())
    try:
        token = load_token(options.token_file)
        if options.listen is not None:
            return asyncio.run(listen(*parse_address(options.listen, any_port=True), token))
        return _join(options.join, token)
    except ConfigError as error:
        return _fail(error, 2)
    except HandshakeError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _join(address: str, token: bytes) -> int:
    link, about = _dial(address, token)
    run = f"the run of {about.get('program', 'a driver')} on {about['machine']}"
    print(f"reached {run}", flush=True)
    ending = worker.serve_remote(link, f"joined {run}")
    if ending.reason:
        status = _fail(f"{run} does without this worker: {ending.reason}", 1)
    else:
        status = 0
        print(f"left {run}, as it was asked to" if ending.was_asked else f"{run} has ended well", flush=True)
    if not ending.is_clean:  # a running learner method would break the shutdown of the interpreter
        os._exit(status)
    return status


def _dial(address: str, token: bytes) -> tuple[Link, About]:
    give_up_at = time.monotonic() + _RETRY_FOR_S
    while True:
        try:
            return asyncio.run(dial(address, token, {"role": "worker"}, timeout_s=_DIAL_TIMEOUT_S))
        except UnreachableError:
            if time.monotonic() > give_up_at:
                raise
        time.sleep(_RETRY_S)


def _fail(error: object, status: int) -> int:
    print(f"{_NAME}: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
