"""Sizes in bytes, as texts."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Return a size with three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.3g} {units[0]}" if num_bytes < 1000 else f"{num_bytes:.0f} {units[0]}"
