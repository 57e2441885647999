"""The whole service on one machine: `tunesmith up`, and the servers alone for tests."""

from worker.embedded.errors import AlreadyRunning, PortTaken, StackError
from worker.embedded.servers import Servers, servers

__all__ = ["AlreadyRunning", "PortTaken", "Servers", "StackError", "servers"]
