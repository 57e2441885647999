"""Where `tunesmith up` would run: whether its data directory and its port are free."""

import errno
import shlex
import socket
from pathlib import Path
from typing import Any

from cli import options
from cli.doctor.finding import Finding, failed, ok


def stack(data_dir: Path) -> Finding:
    if (pid := _holder(data_dir)) is not None:
        return failed(
            "stack", f"one runs on {data_dir}, process {pid}", f"stop it with: kill {pid}, or choose another --data-dir"
        )
    return ok("stack", f"none runs on {data_dir}")


def port(host: str, port: int, data_dir: Path) -> Finding:
    if not 0 < port < 65536:
        return failed("port", f"{port} is none", "a port is a number from 1 to 65535: --port 8000")
    error = _bind_error(host, port)
    if error is None:
        return ok("port", f"{host}:{port} is free")
    if error.errno == errno.EADDRINUSE:
        return _taken(host, port, data_dir)
    remedy = (
        "choose a port from 1024 on with --port" if error.errno == errno.EACCES else "choose an address of this machine: --host"
    )
    return failed("port", f"{host}:{port} cannot be had: {error.strerror or error}", remedy)


def _taken(host: str, port: int, data_dir: Path) -> Finding:
    another = _command(data_dir, host, _free_port(host))
    process = _listener(port)
    if process is None:
        return failed("port", f"{host}:{port} is taken", f"{another}; who has it: sudo ss -ltnp 'sport = :{port}'")
    if _holder(data_dir) in {str(pid) for pid in (process.pid, *(parent.pid for parent in process.parents()))}:
        return ok("port", f"{host}:{port} is that of the running stack")
    return failed(
        "port", f"{host}:{port} is taken by process {process.pid} ({process.name()})", f"{another}, or: kill {process.pid}"
    )


def _command(data_dir: Path, host: str, port: int) -> str:
    """`tunesmith up` on another port, and as it was meant otherwise."""
    words = ["tunesmith", "up"]
    if data_dir != options.DATA_DIR.absolute():
        words += ["--data-dir", str(data_dir)]
    if host != options.HOST:
        words += ["--host", host]
    return shlex.join((*words, "--port", str(port)))


def _holder(data_dir: Path) -> str | None:
    """The process that holds the data directory, as it has written. Shared, so that two doctors do not see each other."""
    import fcntl  # not on Windows, where the rest still has to say so

    try:
        with (data_dir / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except OSError:  # no such file, or not ours to read: the folder's own check tells
        pass
    return None


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # connections that linger after their server's end do not count, a listener does
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def _listener(port: int) -> Any:
    """The psutil.Process that listens there, None if it cannot be told."""
    try:
        import psutil  # type: ignore[import-untyped]  # it has no types of its own
    except ImportError:
        return None
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    except psutil.Error:  # only root may look at other users' sockets
        pass
    return None
