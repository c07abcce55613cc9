"""A job: what it leaves in its folder, and how it leaves its process."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.cache import keeping_datasets, load_dataset, preload
from torchfedrpc.experiments.job import Job, mark_killed, one_line, read_job, unchanged_process

SYNTHETIC = {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 100, "seed": 1}


def test_a_job_records_its_end(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with job.recorded():
        assert read_job(tmp_path)["status"] == "running"
        job.accuracy = 0.5
    found = read_job(tmp_path)
    assert (found["status"], found["error"], found["accuracy"]) == ("done", "", 0.5)


def test_an_error_is_recorded_in_a_line_and_in_full(tmp_path: Path) -> None:
    error = ValueError("two\nlines")
    error.add_note("a note")
    with pytest.raises(ValueError, match="two"), Job(tmp_path).recorded():
        raise error
    assert read_job(tmp_path)["status"] == "failed"
    assert re.fullmatch(r"ValueError: two lines at test_job\.py:\d+ \(a note\)", read_job(tmp_path)["error"])
    assert "raise error" in (tmp_path / "error.txt").read_text()
    with Job(tmp_path).recorded():
        pass
    assert not (tmp_path / "error.txt").exists()


def test_an_interrupted_job_and_a_killed_one_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    with pytest.raises(KeyboardInterrupt), Job(tmp_path / "0").recorded():
        raise KeyboardInterrupt
    with Job(tmp_path / "1").recorded():
        mark_killed(tmp_path)
        assert [read_job(tmp_path / name)["status"] for name in "01"] == ["interrupted", "killed"]


def test_errors_of_this_library_have_no_type_in_their_line() -> None:
    assert one_line(ConfigError("set it")) == "set it"
    assert one_line(KeyError()) == "KeyError"


def test_the_line_of_an_error_says_where_user_code_raised_it() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        torch.utils._pytree.tree_map(lambda number: 1 // number, [0])  # through code of a package
    assert re.fullmatch(r"ZeroDivisionError: .* at test_job\.py:\d+", one_line(caught.value))
    with pytest.raises(RuntimeError) as caught_in_torch:
        torch.nn.Linear(2, 2)(torch.ones(3))
    assert re.search(r" at test_job\.py:\d+$", one_line(caught_in_torch.value))


class Failing:
    """Learner whose method raises."""

    def __init__(self, client_id: str) -> None:
        pass

    def fail(self) -> None:
        raise LookupError("here")


async def test_the_line_of_an_error_says_where_a_learner_raised_it() -> None:
    async with tfr.LearnerProxy(Failing, ["a"], runtime="pseudo") as proxy:
        with pytest.raises(LookupError) as caught:
            await proxy.client("a").fail()
    line = inspect.getsourcelines(Failing.fail)[1] + 1
    assert one_line(caught.value).startswith(f"LookupError: here at test_job.py:{line} (")


def test_a_job_leaves_settings_and_random_streams_as_they_were() -> None:
    def draws() -> tuple[object, ...]:
        streams = random.random(), np.random.rand(), torch.rand(()).item()
        return *streams, torch.get_default_dtype(), torch.is_grad_enabled()

    def change() -> None:
        draws()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        raise RuntimeError

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    with pytest.raises(RuntimeError), unchanged_process():
        change()
    assert draws() == expected


def test_a_data_set_that_is_kept_is_the_same_and_no_change_of_a_job_stays() -> None:
    with keeping_datasets():
        first = load_dataset(SYNTHETIC)
        expected = first.train.inputs.clone()
        first.train.inputs.zero_()
        second = load_dataset(SYNTHETIC)
        assert torch.equal(second.train.inputs, expected)
        assert not torch.equal(load_dataset({**SYNTHETIC, "seed": 2}).train.inputs, expected)
    assert torch.equal(load_dataset(SYNTHETIC).train.inputs, expected)


def test_a_preloaded_data_set_is_taken_once() -> None:
    state = torch.get_rng_state()
    num_threads = torch.get_num_threads()
    try:
        assert preload(SYNTHETIC, []) is True
        assert preload(SYNTHETIC, []) is False
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = load_dataset(SYNTHETIC), load_dataset(SYNTHETIC)
    assert first is not second
    first.train.inputs.zero_()
    assert second.train.inputs.abs().sum() > 0
