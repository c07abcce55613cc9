"""Bundled application: federated learning experiments from the command line."""

from torchfedrpc.registry import datasets, models, partitions

for _name in ("digits", "synthetic"):
    datasets.provide(_name, f"{__name__}.data.{_name}")
for _name in ("logistic", "mlp", "cnn"):
    models.provide(_name, f"{__name__}.models")
for _name in ("iid", "dirichlet", "shards"):
    partitions.provide(_name, f"{__name__}.data.partition")
