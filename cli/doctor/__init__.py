"""`tunesmith doctor`: what this machine lacks, before anything is started.

It lies here and not in `worker`, which the API's image does not hold. No module below imports what an install may lack.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, get_args

from typer import Option

from cli.options import DATA_DIR, HOST, PORT, AsJson, Host, Port, StackDir
from cli.output import busy, show

if TYPE_CHECKING:
    from cli.doctor.finding import Finding

Service = Annotated[
    bool, Option("--service", help="Ask Postgres, the broker and the bucket too, as is done anyway if the settings name one.")
]
Online = Annotated[bool, Option("--online", help="Ask the model hub too.")]


def doctor(
    data_dir: StackDir = DATA_DIR,
    port: Port = PORT,
    host: Host = HOST,
    service: Service = False,
    online: Online = False,
    as_json: AsJson = False,
) -> int:
    """Say what is missing on this machine.

    Look at this machine, this installation and its settings, and say what to mend.
    Nothing is changed.

    Exit status 1 if `tunesmith up` (or, with --service, a process of a service) would
    fail here, else 0.
    """
    from cli.doctor.examination import Asked, examine

    with busy("looking around"):
        findings = examine(Asked(data_dir.expanduser().absolute(), host, port, online, service))
    show([dataclasses.asdict(finding) for finding in findings], _as_text(findings), as_json=as_json)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def _as_text(findings: "Sequence[Finding]") -> str:
    from cli.doctor.finding import as_lines

    return "\n".join((*as_lines(findings), "", _summary(findings)))


def _summary(findings: "Sequence[Finding]") -> str:
    from cli.doctor.finding import State

    counts = Counter(finding.state for finding in findings)
    verdict = "something must be mended" if counts["failed"] else "ready"
    return f"{verdict}: " + ", ".join(f"{counts[state]} {state}" for state in get_args(State))
