"""The settings: whether they can be read, and whether they say what was meant."""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cli.doctor.finding import Finding, failed, ok, warning
from cli.failure import Failed

if TYPE_CHECKING:
    from pydantic import ValidationError

    from app.core.catalog import Catalog
    from app.core.settings import Settings

PREFIX = "TUNESMITH_"


def read() -> "tuple[Settings | None, Finding]":
    """The settings, or None and which of them are wrong. Values are never told: they may be secrets."""
    try:
        from pydantic import ValidationError
        from pydantic_settings import SettingsError

        from app.core.settings import Settings, SourceRefused
    except ImportError as error:
        return None, failed("settings", str(error), "pip install tunesmith")
    try:
        settings = Settings()
    except ValidationError as error:
        named = {_variable(problem["loc"]): None for problem in error.errors()}
        return None, failed("settings", _told(error, _variable), f"correct or unset {', '.join(named)}")
    except SourceRefused as error:
        return None, failed("settings", str(error), f"correct or unset {error.variable}")
    except SettingsError as error:
        # the one thing that pydantic-settings still reads itself: a whole section in one variable
        section = re.sub(r'.*field "(\w+)".*', lambda field: PREFIX + field[1].upper(), str(error))
        return None, failed("settings", f"{section} must be a JSON object", "correct it, or set the variables of the section")
    except (OSError, ValueError, RuntimeError) as error:
        return None, failed("settings", str(error), "correct what it names")
    ours = sum(name.upper().startswith(PREFIX) for name in os.environ)
    return settings, ok("settings", f"valid, {ours} {PREFIX} variables set")


def require() -> "Settings":
    """For a command that cannot go on without them. Raises Failed."""
    settings, finding = read()
    require_fit(finding)
    assert settings is not None
    return settings


def require_catalog(settings: "Settings") -> "Catalog":
    """Raises Failed."""
    bases, finding = read_catalog(settings)
    require_fit(finding)
    assert bases is not None
    return bases


def require_fit(finding: Finding) -> None:
    """Raises Failed."""
    if finding.state == "failed":
        raise Failed(f"{finding.found}; {finding.remedy}")


def unknown() -> Finding:
    """What is misspelt is ignored by every process, and never heard of."""
    from app.core import reference

    if unknown := reference.unknown():
        named = ", ".join(f"{name} (is {meant} meant?)" if meant else name for name, meant in unknown.items())
        return warning("variables", f"no setting has the name of {named}", f"remove or correct {', '.join(unknown)}")
    return ok("variables", f"every {PREFIX} variable names a setting")


def read_catalog(settings: "Settings") -> "tuple[Catalog | None, Finding]":
    """The base models, or None and what is wrong with the operator's file."""
    from pydantic import ValidationError

    from app.core import catalog

    try:
        bases = catalog.load(settings.catalog_file)
    except (OSError, ValueError) as error:
        why = _told(error, _key) if isinstance(error, ValidationError) else error
        remedy = "correct the file, or unset TUNESMITH_CATALOG_FILE"
        return None, failed("catalog", f"TUNESMITH_CATALOG_FILE names {settings.catalog_file}: {why}", remedy)
    return bases, ok("catalog", f"{len(bases)} base models, {settings.inference.base} is served")


def catalog(settings: "Settings") -> Finding:
    bases, finding = read_catalog(settings)
    if bases is None:
        return finding
    served = {"TUNESMITH_INFERENCE__BASE": settings.inference.base, "TUNESMITH_TRAINING__WARM_BASE": settings.training.warm_base}
    for variable, name in served.items():
        if name and bases.find(name) is None:
            return failed(
                "catalog", f"{variable} names {name}, which it lacks", f"{variable}={next(iter(bases))}, or add the base"
            )
    return finding


def prices(settings: "Settings") -> Finding:
    from app.core import prices

    try:
        book = prices.load(settings.price_file)
    except ValueError as error:
        return failed("prices", str(error), "correct the file, or unset TUNESMITH_PRICE_FILE")
    asked = {book.per_million_tokens, *book.bases.values()}
    return ok("prices", f"in {book.currency}" if any(asked) else "training is free")


def secrets(settings: "Settings", *, are_needed: bool) -> Finding:
    """The API refuses to start without them, and is not the only process of a service."""
    values = {"TUNESMITH_KEY_PEPPER": settings.key_pepper, "TUNESMITH_ENGINE_TOKEN": settings.engine_token}
    missing = [name for name, value in values.items() if not value.get_secret_value()]
    if missing:
        values_to_set = " ".join(f"{name}=$(openssl rand -base64 32)" for name in missing)
        remedy = f"export {values_to_set}, the same for every process, and kept for good"
        return (failed if are_needed else warning)("secrets", f"{' and '.join(missing)} empty", remedy)
    return ok("secrets", "key pepper and engine token are set")


def secret_values(settings: "Settings") -> list[str]:
    """Whatever must not be printed, the longest first: a URL before the password in it."""
    from app.core import reference

    values = [variable.value(settings).get_secret_value() for variable in reference.variables() if variable.is_secret]
    urls = [settings.broker_url, *(value for value in values if "://" in value)]
    passwords = [password for url in urls if (password := _password(url))]
    written = [*values, *passwords, *map(unquote, passwords)]
    shown = {"tunesmith"}  # the password of the default URLs is a word that the findings need
    return sorted({value for value in written if len(value) > 3} - shown, key=len, reverse=True)


def _password(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:
        return None


def _told(error: "ValidationError", name: Callable[[tuple[int | str, ...]], str]) -> str:
    """Without the values, which may be secrets."""
    problems = error.errors(include_input=False, include_url=False)
    words = (re.sub(r"^(Value error, must|Input should)", "must", problem["msg"]) for problem in problems)
    return "; ".join(f"{name(problem['loc'])} {wanted}" for problem, wanted in zip(problems, words, strict=True))


def _variable(location: tuple[int | str, ...]) -> str:
    return PREFIX + "__".join(part.upper() for part in location if isinstance(part, str))


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))
