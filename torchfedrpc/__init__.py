"""torchfedrpc: federated learning in PyTorch.

A trainer awaits methods of learners, one per client, as if they were local:

    result = await learner_proxy.train_epoch(client_id="client_1", local_epochs=5)

The same code runs learners in this process, in worker processes, or on the ranks of a torchrun launch.
"""

import importlib
import typing

from torchfedrpc.config import DeviceMap, ExecutionMode, Isolation, LogLevel, OnWorkerLost, RuntimeConfig, Transport
from torchfedrpc.errors import (
    CallTimeoutError,
    CapacityError,
    ConfigError,
    GroupCallError,
    LearnerBusyError,
    MethodNotFoundError,
    QuorumError,
    RemoteError,
    SerializationError,
    SnapshotError,
    TorchFedRpcError,
    UnknownClientError,
    UntrustedTypeError,
    WorkerLostError,
)
from torchfedrpc.events import (
    CallEnded,
    CallStarted,
    CallTimes,
    CheckpointSaved,
    Event,
    ProgressReported,
    ReplayEnded,
    ReplayStarted,
    RoundEnded,
    RoundStarted,
    RunEnded,
    RunStarted,
    WorkerJoined,
    WorkerLeft,
    WorkerLogged,
    WorkerLost,
    WorldFormed,
)
from torchfedrpc.executors.base import AbstractExecutor, ExecutorSpec
from torchfedrpc.executors.local import LocalExecutor
from torchfedrpc.executors.router import ExecutorRouter
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.learners.ditto import DittoLearner
from torchfedrpc.experiments.learners.fedbn import FedBNLearner
from torchfedrpc.experiments.learners.scaffold import ScaffoldLearner
from torchfedrpc.experiments.recipe import build
from torchfedrpc.federation.algorithms.ditto import DittoTrainer
from torchfedrpc.federation.algorithms.fedadagrad import FedAdagradTrainer
from torchfedrpc.federation.algorithms.fedadam import FedAdamTrainer
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.federation.algorithms.fedavgm import FedAvgMTrainer
from torchfedrpc.federation.algorithms.fedbn import FedBNTrainer
from torchfedrpc.federation.algorithms.fedbuff import FedBuffTrainer
from torchfedrpc.federation.algorithms.fednova import FedNovaTrainer
from torchfedrpc.federation.algorithms.fedopt import FedOptTrainer
from torchfedrpc.federation.algorithms.fedprox import FedProxTrainer
from torchfedrpc.federation.algorithms.fedyogi import FedYogiTrainer
from torchfedrpc.federation.algorithms.scaffold import ScaffoldTrainer
from torchfedrpc.federation.best_model import BestModel
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.checkpoints import Checkpoints
from torchfedrpc.federation.client_evaluation import ClientEvaluation
from torchfedrpc.federation.cohorts import (
    AvailabilityWindows,
    PowerOfChoiceCohort,
    RoundRobinCohort,
    UniformCohort,
    WeightedCohort,
)
from torchfedrpc.federation.early_stopping import EarlyStopping
from torchfedrpc.federation.learner_base import Learner
from torchfedrpc.federation.privacy import GaussianMean
from torchfedrpc.federation.robust import CoordinateMedian, MultiKrum, TrimmedMean
from torchfedrpc.federation.simulation import SimulatedClients
from torchfedrpc.federation.trainer import AbstractFederationTrainer
from torchfedrpc.group import GroupResult, LearnerGroup, ReduceResult
from torchfedrpc.host.context import current_call
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.pool import LearnerPool
from torchfedrpc.proxy import LearnerHandle, LearnerProxy
from torchfedrpc.reduce.reducers import Mean, Sum, WeightedMean
from torchfedrpc.registry import (
    aggregator,
    cohort,
    dataset,
    executor,
    get_learner,
    get_trainer,
    learner,
    model,
    partition,
    trainer,
)
from torchfedrpc.run import report_end_of_script as _report_end_of_script
from torchfedrpc.run import run, run_async
from torchfedrpc.stream import LearnerStream
from torchfedrpc.version import __version__
from torchfedrpc.wire.serializer import ParameterSerializer

if typing.TYPE_CHECKING:
    from torchfedrpc import testing as testing
    from torchfedrpc.executors.distributed import DistributedExecutor, PseudoExecutor

__all__ = [
    "AbstractExecutor",
    "AbstractFederationTrainer",
    "AvailabilityWindows",
    "BestModel",
    "CallEnded",
    "CallStarted",
    "CallTimeoutError",
    "CallTimes",
    "Callback",
    "CapacityError",
    "CheckpointSaved",
    "Checkpoints",
    "ClassificationLearner",
    "ClientEvaluation",
    "ConfigError",
    "CoordinateMedian",
    "DeviceMap",
    "DistributedExecutor",
    "DittoLearner",
    "DittoTrainer",
    "EarlyStopping",
    "Event",
    "ExecutionMode",
    "ExecutorRouter",
    "ExecutorSpec",
    "FedAdagradTrainer",
    "FedAdamTrainer",
    "FedAvgMTrainer",
    "FedAvgTrainer",
    "FedBNLearner",
    "FedBNTrainer",
    "FedBuffTrainer",
    "FedNovaTrainer",
    "FedOptTrainer",
    "FedProxTrainer",
    "FedYogiTrainer",
    "GaussianMean",
    "GroupCallError",
    "GroupResult",
    "Isolation",
    "Learner",
    "LearnerBusyError",
    "LearnerGroup",
    "LearnerHandle",
    "LearnerHost",
    "LearnerPool",
    "LearnerProxy",
    "LearnerStream",
    "LocalExecutor",
    "LogLevel",
    "Mean",
    "MethodNotFoundError",
    "MultiKrum",
    "OnWorkerLost",
    "ParameterSerializer",
    "PowerOfChoiceCohort",
    "ProgressReported",
    "PseudoExecutor",
    "QuorumError",
    "ReduceResult",
    "RemoteError",
    "ReplayEnded",
    "ReplayStarted",
    "RoundEnded",
    "RoundRobinCohort",
    "RoundStarted",
    "Run",
    "RunEnded",
    "RunStarted",
    "RuntimeConfig",
    "Samples",
    "ScaffoldLearner",
    "ScaffoldTrainer",
    "SerializationError",
    "SharedRef",
    "SimulatedClients",
    "SnapshotError",
    "Sum",
    "TorchFedRpcError",
    "TrainTest",
    "Transport",
    "TrimmedMean",
    "UniformCohort",
    "UnknownClientError",
    "UntrustedTypeError",
    "WeightedCohort",
    "WeightedMean",
    "WorkerJoined",
    "WorkerLeft",
    "WorkerLogged",
    "WorkerLost",
    "WorkerLostError",
    "WorldFormed",
    "__version__",
    "aggregator",
    "build",
    "cohort",
    "current_call",
    "dataset",
    "executor",
    "get_learner",
    "get_trainer",
    "learner",
    "model",
    "partition",
    "run",
    "run_async",
    "trainer",
]

# Imported on first access, since these modules import torch's RPC, which local runs do not need.
_LATER = {
    "DistributedExecutor": "torchfedrpc.executors.distributed",
    "PseudoExecutor": "torchfedrpc.executors.distributed",
    "testing": "torchfedrpc.testing",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'torchfedrpc' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


_report_end_of_script()
