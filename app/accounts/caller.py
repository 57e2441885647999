from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who asks, as their key says. Every query of a service takes its organization from here.

    `candidate_of` is set for the evaluation of a quality gate, which may ask the model of this job before it is live.
    """

    key_id: str
    organization_id: str
    project_id: str
    organization_slug: str
    candidate_of: str | None = None
