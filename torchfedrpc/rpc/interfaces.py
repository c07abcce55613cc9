"""Addresses, and the network interfaces of this machine."""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import uuid
from pathlib import Path

from torchfedrpc.errors import ConfigError

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
    if resolved == host:
        return f"{host}:{port}"
    itself = ", this machine itself: see its /etc/hosts" if resolved.startswith("127.") else ""
    return f"{host}:{port} (here {resolved}{itself})"


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ConfigError: If there is no such interface, or it has no address.
    """
    import fcntl  # noqa: PLC0415 - only Unix has it, and the package can be imported on other systems

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"runtime.interface={interface}: no such network interface, or it has no IPv4 address (this machine "
                f"has {names})"
            ) from None
    return socket.inet_ntoa(packed[20:24])


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address.

    Raises:
        ConfigError: If no interface has it.
    """
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except ConfigError:
            continue
    raise ConfigError(f"no network interface has the address {address}: name one by runtime.interface")


def network_site() -> str:
    """Identify this machine's boot and network namespace: equal for processes that share a loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # macOS, which has no namespaces; without a network card getnode is random in each process
        return f"{socket.gethostname()}/{uuid.getnode():x}"
