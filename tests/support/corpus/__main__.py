"""Print docs/state.md; with `--observe` run the corpus and print what comes of each kind instead."""

from __future__ import annotations

import asyncio
import sys
import time

from corpus import ways
from corpus.registry import NUM_ROUNDS, WAYS, present
from corpus.table import page
from corpus.ways import surprises


async def observe() -> None:
    """Run all ways, one after another."""
    began = time.monotonic()

    def clock(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s {what}", file=sys.stderr, flush=True)

    expected = await ways.alone()
    clock("alone")
    found = {"beside others": await ways.beside_others(expected)}
    clock("beside others")
    found["evicted"] = await ways.evicted(expected)
    clock("evicted")
    kill_after = range(NUM_ROUNDS - 1) if "--slow" in sys.argv else [NUM_ROUNDS - 2]
    found["two workers"], found["killed"], taken = await ways.on_workers(expected, kill_after)
    clock("two workers, killed")
    found["restored"] = await ways.restored(expected, taken)
    clock("restored")
    print(f"{'':26}" + "".join(f"{way:16}" for way in WAYS))
    for name in [entry.name for entry in present()]:
        print(f"{name:26}" + "".join(f"{found[way][name].word:16}" for way in WAYS))
    for way in WAYS:
        print(f"\n{way}")
        for line in surprises(way, found[way]):
            print(f"  {line[:600]}")


if __name__ == "__main__":
    if "--observe" in sys.argv:
        asyncio.run(observe())
    else:
        print(page(), end="")
