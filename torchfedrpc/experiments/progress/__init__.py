"""Progress of a run while it goes on."""

from torchfedrpc.experiments.progress.live import live_progress

__all__ = ["live_progress"]
