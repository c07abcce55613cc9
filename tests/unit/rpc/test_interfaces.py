"""Network interfaces: by name, or by a range of addresses, since names differ between machines."""

from __future__ import annotations

import socket

import pytest

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import interfaces
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, interface_of, name_of


@pytest.mark.parametrize("interface", [LOOPBACK, "127.0.0.0/8", "127.0.0.1/32"])
def test_a_name_or_a_range_stands_for_an_interface_and_its_address(interface: str) -> None:
    assert address_of(interface) == "127.0.0.1"
    assert name_of(interface) == interface_of("127.0.0.1") == LOOPBACK


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("nowhere0", r"nowhere0: HOST has no such network interface.*lo\S* 127\.0\.0\.1.*give a range of addresses"),
        ("203.0.113.0/24", r"203\.0\.113\.0/24: HOST has no address in this range \(there are .*lo\S* 127\.0\.0\.1"),
        ("eth0/24", r"eth0/24 is neither the name of a network interface nor a range"),
    ],
)
def test_an_interface_that_a_machine_lacks_is_an_error_that_names_the_machine(interface: str, message: str) -> None:
    with pytest.raises(ConfigError, match="runtime.interface=" + message.replace("HOST", socket.gethostname())):
        address_of(interface)


def test_the_address_of_a_name_is_told_with_it() -> None:
    assert interfaces.describe_address("10.0.0.1", 8080, "10.0.0.1") == "10.0.0.1:8080"
    assert interfaces.describe_address("hub", 8080, "10.0.0.1") == "hub:8080 (here 10.0.0.1)"
    odd = interfaces.describe_address("hub", 8080, "127.0.1.1")
    assert odd == "hub:8080 (here 127.0.1.1, this machine itself: see its /etc/hosts)"
