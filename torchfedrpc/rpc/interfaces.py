"""Addresses, and the network interfaces of this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import struct
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import is_loopback

_IS_LINUX = sys.platform == "linux"
LOOPBACK = "lo" if _IS_LINUX else "lo0"
_ADDRESS = re.compile(r"([^\s/:@?#\[\]]+):([0-9]{1,5})")
_SIOCGIFADDR = 0x8915 if _IS_LINUX else 0xC0206921  # see netdevice(7), and <sys/sockio.h> of macOS


def parse_address(address: str, *, any_port: bool = False) -> tuple[str, int]:
    """Split ``HOST:PORT``.

    Args:
        address: a host name or an IPv4 address, and a port.
        any_port: whether port 0 is allowed, by which the system chooses one.

    Raises:
        ConfigError: If the text has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not (0 if any_port else 1) <= int(match[2]) <= 65535:
        raise ConfigError(f"{address!r} is no address of the form HOST:PORT, such as 10.0.0.7:29600")
    return match[1], int(match[2])


def describe_os_error(error: OSError) -> str:
    """The system's text for an error, without the address that Python puts into it as a tuple."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error) or "no answer"


def describe_address(host: str, port: int, resolved: str) -> str:
    """``HOST:PORT``, and of a host name the address that this machine resolves it to.

    Systems such as Debian resolve the own name of a machine to 127.0.1.1, which leads no other machine to it.
    """
    if resolved == host or is_loopback(host):
        return f"{host}:{port}"
    itself = ", this machine itself: see its /etc/hosts" if is_loopback(resolved) else ""
    return f"{host}:{port} (here {resolved}{itself})"


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface, or of this machine in a range such as ``10.0.0.0/24``.

    Raises:
        ConfigError: If there is no such interface, it has no address, or no address is in the range.
    """
    if "/" in interface:
        return _address_within(interface)
    try:
        return _own_address(interface)
    except OSError:
        raise ConfigError(
            f"runtime.interface={interface}: {socket.gethostname()} has no such network interface, or it has no IPv4 "
            f"address (there are {_own_addresses()}); where names differ between machines, give a range of "
            f"addresses, such as 10.0.0.0/24"
        ) from None


def name_of(interface: str) -> str:
    """The name of the network interface of this machine that a name, or a range of addresses, stands for.

    Raises:
        ConfigError: If it stands for none.
    """
    return interface_of(address_of(interface)) if "/" in interface else interface


def _address_within(text: str) -> str:
    try:
        network = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"runtime.interface={text} is neither the name of a network interface nor a range of IPv4 addresses, "
            f"such as 10.0.0.0/24"
        ) from None
    for _, address in _with_addresses():
        if ipaddress.IPv4Address(address) in network:
            return address
    raise ConfigError(
        f"runtime.interface={text}: {socket.gethostname()} has no address in this range (there are "
        f"{_own_addresses()})"
    )


def _own_address(name: str) -> str:
    import fcntl  # noqa: PLC0415 - only Unix has it, and the package can be imported on other systems

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(packed[20:24])


def _with_addresses() -> Iterator[tuple[str, str]]:
    """Yield the network interfaces of this machine that have an IPv4 address, with it."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):
            yield name, _own_address(name)


def _own_addresses() -> str:
    return ", ".join(f"{name} {address}" for name, address in _with_addresses())


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address.

    Raises:
        ConfigError: If no interface has it.
    """
    for name, own in _with_addresses():
        if own == address:
            return name
    raise ConfigError(f"no network interface has the address {address}: name one by runtime.interface")


def network_site() -> str:
    """Identify this machine's boot and network namespace: equal for processes that share a loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # macOS, which has no namespaces; without a network card getnode is random in each process
        return f"{socket.gethostname()}/{uuid.getnode():x}"
