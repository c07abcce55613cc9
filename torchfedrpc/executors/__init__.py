"""How a call reaches the host that owns its learner: one executor for each mode."""
