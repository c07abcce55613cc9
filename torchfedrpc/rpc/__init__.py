"""Learners in other processes: all that knows torch.distributed.rpc, and the processes that serve."""
