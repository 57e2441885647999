"""`tunesmith status`: how a running service does, from the operator's side. `doctor` looks at a machine before that."""

import dataclasses
from typing import TYPE_CHECKING, Any

from cli.options import AsJson
from cli.output import busy, show
from cli.running import Looked, settings_of_service

if TYPE_CHECKING:
    from cli.status.report import Report


def status(data_dir: Looked = None, as_json: AsJson = False) -> int:
    """Say how a running service does.

    Ask the API, the servers behind it and the database how things stand, and say what
    is wrong. Nothing is changed.

    Where settings name a database, a broker or a bucket, that service is looked at,
    with the database's system role: in a deployment, run it in the relay's container.
    Otherwise, and with --data-dir, it is what `tunesmith up` runs there.

    Exit status 0 if all is well, else 1.
    """
    from cli.doctor import configuration
    from cli.status import report

    looked_at = settings_of_service(configuration.require(), data_dir)
    with busy("asking"):
        found = report.look(looked_at)
    show(_as_data(found), _as_text(found), as_json=as_json)
    return 0 if found.is_well else 1


def _as_data(found: "Report") -> dict[str, Any]:
    return {"is_well": found.is_well, "problems": [part.name for part in found.problems], **dataclasses.asdict(found)}


def _as_text(found: "Report") -> str:
    from cli.doctor.finding import as_lines
    from cli.table import columns

    jobs = found.standing["jobs"].items() if found.standing else ()
    told = [("jobs", *(f"{count} {state}" for state, count in jobs if count))] if any(count for _, count in jobs) else []
    verdict = "all is well" if found.is_well else "not well: " + ", ".join(part.name for part in found.problems)
    return "\n".join((*as_lines(found.parts), "", *columns(told), verdict))
