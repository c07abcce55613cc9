"""Chaos: faults strike a federated run, which has to go on in time and to end with the bits of an undisturbed one."""
