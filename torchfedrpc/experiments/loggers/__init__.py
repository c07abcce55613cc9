"""Loggers: callbacks that write a run's settings, rounds and end to files or to a tracking tool."""

from torchfedrpc.experiments.loggers.base import Outcome, RunLogger
from torchfedrpc.experiments.loggers.csv_file import CsvLogger
from torchfedrpc.experiments.loggers.json_lines import JsonLinesLogger
from torchfedrpc.experiments.loggers.mlflow import MlflowLogger
from torchfedrpc.experiments.loggers.tensorboard import TensorBoardLogger
from torchfedrpc.experiments.loggers.wandb import WandbLogger

__all__ = [
    "CsvLogger",
    "JsonLinesLogger",
    "MlflowLogger",
    "Outcome",
    "RunLogger",
    "TensorBoardLogger",
    "WandbLogger",
]
