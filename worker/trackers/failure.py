"""Why a tracker was not told."""


class TrackerFailed(Exception):
    """The message is for the job's owner and names no address; `detail` is for the operator's log."""

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.detail = detail or message
