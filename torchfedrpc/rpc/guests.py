"""What a driver tells whom it greets, and how it sees a worker that it has greeted."""

from __future__ import annotations

import sys
from pathlib import Path

from torchfedrpc.rpc.greeting import About, Greeted
from torchfedrpc.rpc.interfaces import network_site
from torchfedrpc.rpc.member import Member


def about_driver() -> About:
    """What a driver tells about itself, beside what is common to all."""
    script = Path(sys.argv[0])
    return {"role": "driver", "program": script.parent.name if script.name == "__main__.py" else script.name}


def member_of(guest: Greeted, label: str = "") -> Member:
    """A worker that was greeted, as a member of the run.

    Args:
        guest: the worker.
        label: its name; empty lets the run name it.
    """

    def dismiss(reason: str) -> None:
        guest.link.stop(reason)
        guest.pulse.close()

    return Member(
        label,
        guest.link,
        guest.pulse,
        guest.about["machine"],
        dismiss=dismiss,
        elsewhere=guest.about["site"] != network_site(),
        imports_main="name",
    )
