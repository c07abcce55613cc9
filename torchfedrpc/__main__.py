"""``python -m torchfedrpc``: the ``torchfedrpc`` command."""

from __future__ import annotations

from torchfedrpc.experiments.cli import main

if __name__ == "__main__":
    main()
