"""``python -m torchfedrpc``: the same as the ``torchfedrpc`` command."""

from __future__ import annotations

from torchfedrpc.cli import main

if __name__ == "__main__":
    main()
