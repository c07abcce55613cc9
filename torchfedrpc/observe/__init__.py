"""What a run shows of itself: events, progress, history and reports."""
