"""What can go wrong with the embedded stack and is told in one line."""


class StackError(Exception):
    """The stack cannot start or go on; the message says why and what to do."""


class AlreadyRunning(StackError):
    """Another process holds the data directory."""


class PortTaken(StackError):
    """Someone else listens where the API should."""
