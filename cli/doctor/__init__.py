"""`tunesmith doctor`: what this machine lacks, before anything is started.

It lies here and not in `worker`, which the API's image does not hold. No module below imports what an install may lack.
"""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cli import up

if TYPE_CHECKING:
    from cli.doctor.finding import Finding

DESCRIPTION = """\
Look at this machine, this installation and its settings, and say what to mend. Nothing is changed.

Exit status 1 if `tunesmith up` (or, with --service, a process of a service) would fail here, else 0."""

MARKS = {"ok": "ok", "warning": "WARN", "failed": "FAIL", "skipped": "skip"}


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what is missing on this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=up.DATA_DIR, metavar="DIR", help="as for `tunesmith up` (%(default)s)")
    parser.add_argument("--port", type=int, default=up.PORT, help="as for `tunesmith up` (%(default)s)")
    parser.add_argument("--host", default=up.HOST, help="as for `tunesmith up` (%(default)s)")
    parser.add_argument(
        "--service",
        action="store_true",
        help="ask Postgres, the broker and the bucket too, as is done anyway if the settings name one",
    )
    parser.add_argument("--online", action="store_true", help="ask the model hub too")
    parser.add_argument("--json", action="store_true", help="a list of objects: name, state, found, remedy")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cli.doctor.examination import Asked, examine

    asked = Asked(options.data_dir.expanduser().absolute(), options.host, options.port, options.online, options.service)
    findings = examine(asked)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(_as_text(findings))
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def _as_text(findings: "Sequence[Finding]") -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.state]:4}  {finding.name:{width}}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"{'':{width + 6}}  -> {finding.remedy}")
    return "\n".join((*lines, "", _summary(findings)))


def _summary(findings: "Sequence[Finding]") -> str:
    from cli.doctor.finding import State

    counts = Counter(finding.state for finding in findings)
    verdict = "something must be mended" if counts["failed"] else "ready"
    return f"{verdict}: " + ", ".join(f"{counts[state]} {state}" for state in get_args(State))
