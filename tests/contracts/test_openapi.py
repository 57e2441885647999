"""Whatever the published schema allows, and much that it does not, is answered: never with a 5xx, always in the envelope."""

from collections.abc import Callable

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openai import OpenAI
from pydantic import SecretStr

from app.core.settings import Settings
from app.main import create_app
from tests import make

ANY = SecretStr("any")
document = create_app(Settings(key_pepper=ANY, engine_token=ANY)).openapi()
published = schemathesis.openapi.from_dict(document)
INFERENCE = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture
def key(client: OpenAI) -> str:
    return client.api_key


def test_of(method: str, path: str) -> Callable[..., None]:
    """A function for each operation: those that Schemathesis makes of one share an id, and xdist would run the first alone."""

    @published.include(method=method, path=path).parametrize()
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )
    def test_no_input_is_a_server_error(case: schemathesis.Case, api_url: str, key: str) -> None:
        answer = case.call(base_url=api_url, headers={"Authorization": f"Bearer {key}"})

        # no engine runs beside this API: both say so, and nothing else may
        waits = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and case.path in {"/readyz", *INFERENCE}
        assert answer.status_code < 500 or waits, answer.text
        if answer.status_code >= 400 and case.path != "/readyz":
            make.require_envelope(answer.status_code, answer.json())

    return test_no_input_is_a_server_error


test_of.__test__ = False  # type: ignore[attr-defined]
for path, operations in document["paths"].items():
    for method in operations:
        globals()[f"test_no_input_is_a_server_error[{method.upper()} {path}]"] = test_of(method, path)
