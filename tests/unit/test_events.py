"""The event bus: subscribers receive all events in order, and none can harm the run."""

from __future__ import annotations

import logging

import pytest

from torchfedrpc.events import CallEnded, CallStarted, Event, EventBus, RoundStarted

EVENT = RoundStarted(0, 3)


@pytest.fixture
def bus() -> EventBus:
    return EventBus()


def test_subscribers_are_told_in_the_order_of_subscription(bus: EventBus) -> None:
    told: list[tuple[str, Event]] = []
    bus.subscribe(lambda event: told.append(("first", event)))
    bus.subscribe(lambda event: told.append(("second", event)))
    bus.publish(EVENT)
    assert told == [("first", EVENT), ("second", EVENT)]


def test_ended_subscription_receives_no_further_event(bus: EventBus) -> None:
    told: list[Event] = []
    unsubscribe = bus.subscribe(told.append)
    unsubscribe()
    unsubscribe()
    bus.publish(EVENT)
    assert told == []


def test_a_callback_subscribed_twice_ends_one_subscription_at_a_time(bus: EventBus) -> None:
    told: list[Event] = []
    first = bus.subscribe(told.append)
    bus.subscribe(told.append)
    first()
    bus.publish(EVENT)
    assert told == [EVENT]


def test_a_subscriber_that_raises_is_logged_and_the_others_are_told(
    bus: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []

    def fail(event: Event) -> None:
        raise ValueError("a subscriber's own fault")

    bus.subscribe(fail)
    bus.subscribe(told.append)
    with caplog.at_level(logging.ERROR):
        bus.publish(EVENT)
    assert told == [EVENT]
    assert "a subscriber's own fault" in caplog.text
    assert repr(EVENT) in caplog.text


def test_a_subscriber_may_stop_the_run(bus: EventBus) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    bus.subscribe(stop)
    with pytest.raises(KeyboardInterrupt):
        bus.publish(EVENT)


def test_a_subscriber_may_end_its_own_subscription(bus: EventBus) -> None:
    told: list[str] = []
    ends = [lambda: None]

    def once(event: Event) -> None:
        told.append("once")
        ends[0]()

    ends[0] = bus.subscribe(once)
    bus.subscribe(lambda event: told.append("always"))
    bus.publish(EVENT)
    bus.publish(EVENT)
    assert told == ["once", "always", "always"]


def test_subscriber_added_during_an_event_receives_the_next(bus: EventBus) -> None:
    told: list[Event] = []
    unsubscribe = bus.subscribe(lambda event: bus.subscribe(told.append))
    bus.publish(EVENT)
    assert told == []
    unsubscribe()
    bus.publish(EVENT)
    assert told == [EVENT]


def test_an_event_may_cause_another(bus: EventBus) -> None:
    told: list[Event] = []
    ended = CallEnded(1, "client_1", "evaluate", 0.5, None)

    def answer(event: Event) -> None:
        told.append(event)
        if isinstance(event, CallStarted):
            bus.publish(ended)

    bus.subscribe(answer)
    started = CallStarted(1, "client_1", "evaluate")
    bus.publish(started)
    assert told == [started, ended]


def test_events_cannot_be_changed_by_a_subscriber() -> None:
    with pytest.raises(AttributeError):
        EVENT.round_num = 5  # type: ignore[misc]
