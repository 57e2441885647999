from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who asks, as their key says. Every query of a service takes its organization from here."""

    key_id: str
    organization_id: str
    project_id: str
    organization_slug: str
