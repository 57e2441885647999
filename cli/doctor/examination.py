"""Every check in the order it is told."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.doctor import configuration, folders, gpu, machine, place, servers, services, training
from cli.doctor.finding import Finding, failed

if TYPE_CHECKING:
    from app.core.catalog import Base
    from app.core.settings import Settings


@dataclass(frozen=True)
class Asked:
    """What the command line says. `is_service` asks the servers also if no setting names one."""

    data_dir: Path
    host: str
    port: int
    is_online: bool
    is_service: bool


def examine(asked: Asked) -> list[Finding]:
    """No check raises: what nobody foresaw is a finding as well."""
    settings, told = configuration.read()
    return without_secrets(_examined(asked, settings, told), settings)


def _examined(asked: Asked, settings: "Settings | None", told: Finding) -> Iterator[Finding]:
    yield from _guarded("python", machine.python)
    yield from _guarded("platform", machine.system)
    yield from _guarded("memory", machine.memory)
    yield from _guarded("cpu", machine.cores)
    yield from _guarded("user", machine.user)
    yield told
    yield from _guarded("variables", configuration.unknown)
    if settings is not None:
        yield from _guarded("catalog", partial(configuration.catalog, settings))
        yield from _guarded("prices", partial(configuration.prices, settings))
    is_service = asked.is_service or (settings is not None and services.are_named(settings))
    for room in folders.rooms(None if asked.is_service else asked.data_dir, settings, is_service=is_service):
        yield from _guarded(room.name, partial(folders.examine, room))
    yield from _guarded("shared memory", folders.shared_memory)
    if not asked.is_service:
        yield from _embedded(asked)
    base = servers.served(settings)
    yield from _guarded("base model", partial(servers.base_model, base, settings))
    yield from _trained()
    if settings is not None and is_service:
        yield from _guarded("secrets", partial(configuration.secrets, settings, are_needed=asked.is_service))
        yield from services.examine(settings, all_of_them=asked.is_service)
    yield from _guarded("hub", partial(_hub, asked, base, settings))


def _embedded(asked: Asked) -> Iterator[Finding]:
    """What only `tunesmith up` needs."""
    yield from _guarded("stack", partial(place.stack, asked.data_dir))
    yield from _guarded("port", partial(place.port, asked.host, asked.port, asked.data_dir))
    yield from _guarded("postgres", servers.postgres)
    yield from _guarded("valkey", servers.valkey)
    yield from _guarded("s3", servers.s3)


def _hub(asked: Asked, base: "Base | None", settings: "Settings | None") -> Finding:
    is_needed = settings is not None and base is not None and not asked.is_service and servers.to_be_fetched(base, settings)
    return services.hub(base if is_needed else None, is_online=asked.is_online)


def _trained() -> Iterator[Finding]:
    report = training.probe()
    yield from _guarded("torch", partial(training.torch, report))
    yield from _guarded("bitsandbytes", partial(training.bitsandbytes, report))
    yield from _guarded("compiler", training.compiler)
    yield from _guarded("gpu", partial(gpu.examine, report))


def _guarded(name: str, check: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield check()
    except Exception as error:  # one machine's surprise must not hide the other findings
        yield failed(name, f"could not be examined: {type(error).__name__}: {error}", "report this as a bug, with this line")


def without_secrets(findings: Iterable[Finding], settings: "Settings | None") -> list[Finding]:
    """Errors of libraries quote what they were given."""
    hidden = configuration.secret_values(settings) if settings is not None else ()

    def clean(text: str) -> str:
        for secret in hidden:
            text = text.replace(secret, "***")
        return " ".join(text.split())

    return [replace(one, found=clean(one.found), remedy=one.remedy and clean(one.remedy)) for one in findings]
