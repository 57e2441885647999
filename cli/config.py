"""`tunesmith config`: what is set, and what may be."""

import argparse

from cli.failure import failed


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Show the settings a process started here would have, secrets hidden, and what is set in vain."
    parser = subparsers.add_parser("config", help="show the configuration", description=text)
    parser.add_argument("--markdown", action="store_true", help="write the reference instead: docs/configuration.md")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from app.core import reference
    from app.core.settings import Settings
    from cli.doctor import configuration

    if options.markdown:
        print(reference.markdown(), end="")
        return 0
    settings = configuration.read_or_say()
    if settings is None:
        return 1
    defaults = Settings.model_construct()
    for variable in reference.variables():
        mark = " " if variable.value(settings) == variable.value(defaults) else "*"
        print(f"{mark} {variable.name} = {variable.shown(settings)}")
    unknown = reference.unknown()
    for name, meant in unknown.items():
        failed(f"{name} sets nothing; " + (f"did you mean {meant}?" if meant else "docs/configuration.md lists what does"))
    return 1 if unknown else 0
