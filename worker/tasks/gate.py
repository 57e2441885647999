"""Let trained models go live, or not: an evaluation that is over has said which."""

from app.jobs import gates
from worker.services import Services


def conclude_next(to: Services) -> bool:
    """Draw the conclusion from one evaluation; False when none waits."""
    with to.sessions.begin() as session:
        return gates.conclude_next(session)
