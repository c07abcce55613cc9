"""Network interfaces of this machine and their addresses."""

from __future__ import annotations

import socket
import struct
import sys
import uuid
from pathlib import Path

from torchfedrpc.errors import ConfigError

_IS_LINUX = sys.platform == "linux"
LOOPBACK = "lo" if _IS_LINUX else "lo0"
_SIOCGIFADDR = 0x8915 if _IS_LINUX else 0xC0206921  # see netdevice(7), and <sys/sockio.h> of macOS


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ConfigError: there is no such interface, or it has no address.
    """
    import fcntl  # noqa: PLC0415 - Unix alone has it, and the package is imported elsewhere too

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
        ConfigError: none has.
    """
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except ConfigError:
            continue
    raise ConfigError(f"no network interface has the address {address}: name one by runtime.interface")


def network_site() -> str:
    """What two processes have in common exactly if they reach each other on loopback: the boot and the namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # macOS, which has no namespaces; without a network card each process has a number of its own
        return f"{socket.gethostname()}/{uuid.getnode():x}"
