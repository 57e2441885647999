"""Why a base cannot be used."""


class BaseRefused(Exception):
    """This base cannot be used as the catalog describes it. The message is for the operator."""


class HubUnavailable(BaseRefused):
    """The hub does not answer now, or broke off; the same request may do later."""
