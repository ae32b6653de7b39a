"""The network interface by which this machine reaches another: ``interface.py ADDRESS-OR-NAME``; nothing where it reaches it by none."""

import socket
import sys

import psutil


def interface_to(other: str) -> str | None:
    """Its name, from the route that a packet would take (none is sent); None when there is no route or no such name."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return None
    addresses = ((name, entry.address.partition("%")[0]) for name, entries in psutil.net_if_addrs().items() for entry in entries)
    return next((name for name, address in addresses if address == own), None)


if __name__ == "__main__":
    print(interface_to(sys.argv[1]) or "")
