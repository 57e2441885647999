"""A name server on this machine, and who asks it: what a customer who controls a name can do to whoever resolves it."""

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

A, AAAA = 1, 28
HEADER_BYTES, FIXED_RECORD_BYTES = 12, 12
ITS_NAME = b"\xc0\x0c"  # that of the question


class NameServer:
    """Answers each lookup with the next of `answers`, whatever the name is, the last for ever, and none to be kept (TTL 0)."""

    def __init__(self, listener: socket.socket, answers: Sequence[Sequence[str]]) -> None:
        self.lookups = 0
        self._listener, self._answers = listener, answers

    def resolve(self, host: str) -> list[str]:
        """Every address of a name, asked for as `socket.getaddrinfo` does: IPv4 first, then IPv6."""
        return [address for kind in (A, AAAA) for address in self._ask(host, kind)]

    def serve(self) -> None:
        """Until an empty query comes."""
        while True:
            query, client = self._listener.recvfrom(512)
            if not query:
                return
            kind, _ = struct.unpack(">2H", query[-4:])
            self.lookups += kind == A
            addresses = self._answers[min(self.lookups, len(self._answers)) - 1]
            records = [_record(kind, address) for address in addresses if _kind(address) == kind]
            head = query[:2] + struct.pack(">5H", 0x8180, 1, len(records), 0, 0)
            self._listener.sendto(head + query[HEADER_BYTES:] + b"".join(records), client)

    def stop(self) -> None:
        with _socket() as caller:
            caller.sendto(b"", self._listener.getsockname())

    def _ask(self, host: str, kind: int) -> list[str]:
        labels = b"".join(bytes([len(label)]) + label.encode() for label in host.split("."))
        query = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\x00" + struct.pack(">2H", kind, 1)
        with _socket() as caller:
            caller.settimeout(5)
            caller.sendto(query, self._listener.getsockname())
            records = caller.recv(4096)[len(query) :]
        family, length = (socket.AF_INET, 4) if kind == A else (socket.AF_INET6, 16)
        starts = range(FIXED_RECORD_BYTES, len(records), FIXED_RECORD_BYTES + length)
        return [socket.inet_ntop(family, records[start : start + length]) for start in starts]


@contextmanager
def serving(*answers: Sequence[str]) -> Iterator[NameServer]:
    with _socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = NameServer(listener, answers)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _kind(address: str) -> int:
    return A if ip_address(address).version == 4 else AAAA


def _record(kind: int, address: str) -> bytes:
    packed = ip_address(address).packed
    return ITS_NAME + struct.pack(">2HIH", kind, 1, 0, len(packed)) + packed
