"""Executors: one per execution mode; each sends calls to the hosts of learners."""

from torchfedrpc.registry import executors

executors.provide("distributed", "torchfedrpc.executors.distributed")
executors.provide("pseudo", "torchfedrpc.executors.distributed")
