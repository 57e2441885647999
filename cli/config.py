"""`tunesmith config`: what is set, and what may be."""

from typing import Annotated

from typer import Option

from cli.failure import say
from cli.options import AsJson
from cli.output import show

Markdown = Annotated[bool, Option("--markdown", help="Write the reference instead: docs/configuration.md.")]


def config(markdown: Markdown = False, as_json: AsJson = False) -> int:
    """Show the configuration.

    The settings that a process started here would have, secrets hidden, and what is
    set in vain: then the status is 1.
    """
    from app.core import reference
    from app.core.settings import Settings
    from cli.doctor import configuration

    if markdown:
        print(reference.markdown(), end="")
        return 0
    settings, defaults = configuration.require(), Settings.model_construct()
    variables = list(reference.variables())
    shown = {variable.name: variable.shown(settings) for variable in variables}
    changed = {variable.name for variable in variables if variable.value(settings) != variable.value(defaults)}
    lines = (f"{'*' if name in changed else ' '} {name} = {value}" for name, value in shown.items())
    show(shown, "\n".join(lines), as_json=as_json)
    unknown = reference.unknown()
    for name, meant in unknown.items():
        say(f"{name} sets nothing; " + (f"did you mean {meant}?" if meant else "docs/configuration.md lists what does"))
    return 1 if unknown else 0
