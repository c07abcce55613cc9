"""What learners log and print reaches the driver, with worker and client, in all modes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial

import pytest
from conftest import Fresh, Seen

import torchfedrpc as tfr
from torchfedrpc.events import WorkerLogged


def logged_by(seen: Seen, client_id: str) -> list[WorkerLogged]:
    return [event for event in seen.events if isinstance(event, WorkerLogged) and event.client_id == client_id]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


async def test_a_record_of_a_method_is_an_event_and_a_line_of_the_drivers_logging(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    began = time.time()
    await proxy.custom_method(one, "log_all", ["größe 100% of\nall"], "warning")
    await seen.until(lambda: logged_by(seen, one))
    (event,) = logged_by(seen, one)
    assert event.worker in proxy.stats()["workers"]
    assert (event.level, event.logger) == (logging.WARNING, "learners.probe")
    assert event.message == "größe 100% of\nall"
    assert began - 1 <= event.time <= time.time() + 1
    (record,) = [record for record in records.records if "größe" in record.getMessage()]
    assert record.getMessage() == f"[{event.worker} {one}] größe 100% of\nall"
    assert (record.levelno, record.name) == (logging.WARNING, "learners.probe")
    assert record.created == pytest.approx(event.time)


async def test_records_of_a_worker_are_in_order(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    messages = [f"line {number}" for number in range(200)]
    await proxy.custom_method(one, "log_all", messages, "info")
    await seen.until(lambda: len(logged_by(seen, one)) == len(messages))
    assert [event.message for event in logged_by(seen, one)] == messages


async def test_records_of_a_call_that_fails_arrive_with_the_traceback(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="plain"):
        await proxy.custom_method(one, "log_and_fail")
    await seen.until(lambda: logged_by(seen, one))
    (event,) = logged_by(seen, one)
    assert event.level == logging.ERROR
    assert event.message.startswith("about to fail\nTraceback")
    assert "ValueError: ('plain', 1)" in event.message


async def test_records_of_async_methods_have_their_own_clients(
    proxy: tfr.LearnerProxy, fresh: Fresh, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    clients = fresh.together(3)

    def has_two(client_id: str) -> bool:
        return len(logged_by(seen, client_id)) == 2

    await proxy.clients(clients).call("log_async", "info")
    for client_id in clients:
        await seen.until(partial(has_two, client_id))
        assert {event.message for event in logged_by(seen, client_id)} == {f"{client_id} begins", f"{client_id} ends"}


async def test_printed_lines_of_workers_reach_the_driver(
    proxy: tfr.LearnerProxy, mode: str, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    if mode == "local":
        pytest.skip("printed lines are on the driver's streams already")
    await proxy.custom_method(one, "print_all", ["first", "half ", "\x1b[31mred\x1b[0m \x07 bell", "10%\r100%"])
    await seen.until(lambda: len(logged_by(seen, one)) == 4)
    events = logged_by(seen, one)
    assert [event.message for event in events] == ["first", "half ", "red \\x07 bell", "100%"]
    assert {(event.level, event.logger) for event in events} == {(logging.INFO, "stdout")}
    lines = [record.getMessage() for record in records.records if record.name == "torchfedrpc.workers"]
    assert lines[0] == f"[{events[0].worker} {one}] first"


async def test_printed_lines_that_no_handler_takes_are_printed_by_the_driver_once(
    proxy: tfr.LearnerProxy, mode: str, one: str, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    if mode == "local":
        pytest.skip("printed lines are on the driver's streams already")
    await proxy.custom_method(one, "print_all", ["for the terminal"])
    await seen.until(lambda: logged_by(seen, one))
    (event,) = logged_by(seen, one)
    assert capfd.readouterr().out.splitlines() == [f"[{event.worker} {one}] for the terminal"]


async def test_warning_of_a_method_reaches_the_driver(
    proxy: tfr.LearnerProxy, mode: str, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    if mode == "local":
        pytest.skip("the warnings of the driver's process are its user's own")
    await proxy.custom_method(one, "warn", "rare")
    await seen.until(lambda: logged_by(seen, one))
    (event,) = logged_by(seen, one)
    assert (event.level, event.logger) == (logging.WARNING, "py.warnings")
    assert "UserWarning: rare" in event.message


async def test_long_message_arrives_whole(
    proxy: tfr.LearnerProxy, mode: str, one: str, seen: Seen, records: pytest.LogCaptureFixture
) -> None:
    message = "\n".join("ü" * 70 + str(number) for number in range(100))
    await proxy.custom_method(one, "log_all", [message], "info")
    await proxy.custom_method(one, "log_all", ["the last"], "info")
    await seen.until(lambda: any(event.message == "the last" for event in logged_by(seen, one)))
    assert "\n".join(event.message for event in logged_by(seen, one)[:-1]) == message
