"""Run a command where no host can be reached, and print the names that it looked up.

    python tests/lookups.py COMMAND...    within new user, network and mount namespaces; see test_privacy.py

In namespaces of its own: the loopback device is up, and the only name server is this process.
"""

import fcntl
import socket
import struct
import subprocess
import sys
import threading

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
HEADER, NO_SUCH_NAME = 12, b"\x81\x83"


def name_of(query: bytes) -> str:
    """Return the name that a DNS query asks for."""
    parts, place = [], HEADER
    while size := query[place]:
        parts.append(query[place + 1 : place + 1 + size].decode())
        place += size + 1
    return ".".join(parts)


def serve(server: socket.socket, names: list[str]) -> None:
    """Note the names that are asked for, and say that there are none."""
    while True:
        query, address = server.recvfrom(512)
        names.append(name_of(query))
        server.sendto(query[:2] + NO_SUCH_NAME + query[4:6] + bytes(6) + query[HEADER:], address)


def main() -> None:
    """Run the command."""
    server, names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), list[str]()
    fcntl.ioctl(server, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
    server.bind(("127.0.0.1", 53))
    threading.Thread(target=serve, args=(server, names), daemon=True).start()
    code = subprocess.run(sys.argv[1:], check=False).returncode
    print("looked up:", *sorted(set(names)))
    sys.exit(code)


if __name__ == "__main__":
    main()
