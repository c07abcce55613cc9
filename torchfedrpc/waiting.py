"""Reports of long waits: every 10 seconds, a warning names what is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 10.0


@contextlib.asynccontextmanager
async def reported(describe: Callable[[], str]) -> AsyncIterator[None]:
    """Log what the block waits for, and for how long so far, every 10 s until it ends.

    Args:
        describe: Returns what is waited for, as the beginning of a sentence.
    """
    reporting = asyncio.ensure_future(_report(describe))
    try:
        yield
    finally:
        reporting.cancel()
        await asyncio.wait([reporting])


async def _report(describe: Callable[[], str]) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(REPORT_EVERY_S)
        logger.warning("%s, for %.0f s so far", describe(), time.monotonic() - began)
