"""MNIST, FashionMNIST, EMNIST, CIFAR10 and CIFAR100, from the files that torchvision downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.registry import dataset

_MOMENTS = {
    "MNIST": ([0.1307], [0.3081]),
    "FashionMNIST": ([0.2860], [0.3530]),
    "EMNIST": ([0.1736], [0.3317]),  # of the split byclass
    "CIFAR10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "CIFAR100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}
"""Name -> means and standard deviations of the channels of the training set, with pixels from 0 to 1."""


@dataset("torchvision")
def torchvision(
    *, name: str = "MNIST", root: str = "data", download: bool = False, split: str = "balanced"
) -> TrainTest:
    """Load a data set of torchvision; inputs are [num_samples, channels, height, width], float32.

    Each channel has mean 0 and deviation 1 over the training set.

    Args:
        name: ``MNIST``, ``FashionMNIST``, ``EMNIST``, ``CIFAR10`` or ``CIFAR100``, in any capitals.
        root: Folder of torchvision's data sets, as its own ``root``: it contains ``MNIST/raw/`` and so on.
        download: Whether torchvision downloads files that are missing. On machines of a cluster do it once before a
            run, since their workers would all download.
        split: Split of EMNIST: ``byclass``, ``bymerge``, ``balanced``, ``letters``, ``digits`` or ``mnist``. Its
            images are turned upright, and the labels of ``letters`` begin at 0.

    Raises:
        ConfigError: If torchvision is not installed, a name is unknown, a file is missing or damaged, or the download
            fails.
    """
    extras.require("torchvision", "dataset=torchvision", extra="libraries")
    from torchvision import datasets  # noqa: PLC0415 - optional, and takes seconds to import

    name = {known.lower(): known for known in _MOMENTS}.get(str(name).lower(), name)
    if name not in _MOMENTS:
        raise ConfigError(f"dataset.name={name} is unknown{suggest(str(name), _MOMENTS)}")
    if name == "EMNIST" and split not in datasets.EMNIST.splits:
        raise ConfigError(f"dataset.split={split} is unknown{suggest(str(split), datasets.EMNIST.splits)}")
    make, folder = getattr(datasets, name), Path(root).expanduser()
    if download:
        _download(make, folder, split)
    read = _read_cifar if name.startswith("CIFAR") else _read_idx
    parts = [_samples(name, split, *part) for part in read(make, folder, split)]
    return TrainTest(*parts)


def _download(make: Any, folder: Path, split: str) -> None:
    settings = {"split": split} if make.__name__ == "EMNIST" else {}
    try:
        make(folder, download=True, **settings)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"dataset.download=true: no {make.__name__} in {folder}: {error}") from error


def _samples(name: str, split: str, images: Tensor, labels: Tensor) -> Samples:
    """Return samples of images, [num_samples, channels, height, width], uint8."""
    if name == "EMNIST":
        images = images.transpose(2, 3)  # its files have columns for rows
        labels = labels - int(split == "letters")
    means, deviations = (torch.tensor(moment).view(1, -1, 1, 1) for moment in _MOMENTS[name])
    inputs = images.contiguous().float().div_(255).sub_(means).div_(deviations)
    return Samples(inputs, labels)


def _read_idx(make: Any, folder: Path, split: str) -> list[tuple[Tensor, Tensor]]:
    """Read images and labels of training and test set from files in the format of MNIST."""
    from torchvision.datasets.mnist import read_image_file, read_label_file  # noqa: PLC0415 - optional

    prefixes = [f"emnist-{split}-train", f"emnist-{split}-test"] if make.__name__ == "EMNIST" else ["train", "t10k"]
    raw = folder / make.__name__ / "raw"
    pairs = [(raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte") for prefix in prefixes]
    _check_present(folder, [path for pair in pairs for path in pair])
    parts = []
    for images_path, labels_path in pairs:
        images, labels = _read(images_path, read_image_file), _read(labels_path, read_label_file)
        if len(images) != len(labels):
            raise _damaged(labels_path, f"it has {len(labels)} labels for {len(images)} images")
        parts.append((images.unsqueeze(1), labels))
    return parts


def _read_cifar(make: Any, folder: Path, split: str) -> list[tuple[Tensor, Tensor]]:
    """Read images and labels of training and test set from files of CIFAR, whose checksums torchvision knows."""
    from torchvision.datasets.utils import check_integrity  # noqa: PLC0415 - optional

    checksums = {folder / make.base_folder / file: md5 for file, md5 in [*make.train_list, *make.test_list]}
    checksums[folder / make.base_folder / make.meta["filename"]] = make.meta["md5"]
    _check_present(folder, list(checksums))
    for path, md5 in checksums.items():
        if not check_integrity(str(path), md5):
            raise _damaged(path, f"its MD5 is not {md5}")
    parts = [make(folder, train=is_train) for is_train in (True, False)]
    return [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts]


def _check_present(folder: Path, paths: Sequence[Path]) -> None:
    missing = [path.relative_to(folder) for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"dataset.root={folder}: {len(missing)} of {len(paths)} files are missing: "
            f"{', '.join(map(str, missing))}; set dataset.root to the folder that contains {missing[0].parts[0]}/, "
            f"or dataset.download=true"
        )


def _read(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    try:
        return read(str(path))
    except Exception as error:  # its reader asserts, indexes and views
        raise _damaged(path, f"{type(error).__name__} {error}".strip()) from error


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is damaged: {reason}; delete it, and copy or download it again (dataset.download=true)"
    )
