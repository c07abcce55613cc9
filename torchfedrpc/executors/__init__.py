"""How a call reaches the host that owns its learner: one executor for each mode."""

from torchfedrpc.registry import executors

executors.provide("distributed", "torchfedrpc.executors.distributed")
executors.provide("pseudo", "torchfedrpc.executors.pseudo")
