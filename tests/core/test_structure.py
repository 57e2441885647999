"""Which JSON schemas an answer can be held to."""

from typing import Any

import pytest

from app.core.structure import MAX_CHARACTERS, SchemaRefused, grammar_of


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "array", "items": {"$ref": "#/$defs/one"}, "$defs": {"one": {"type": "string", "pattern": "^[a-z]+$"}}},
        {"anyOf": [{"type": "null"}, {"enum": ["a", 1]}]},
    ],
)
def test_a_schema_becomes_a_grammar(schema: dict[str, Any]) -> None:
    assert grammar_of(schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater"),
        ({"description": "x" * MAX_CHARACTERS}, "characters"),
    ],
)
def test_one_that_cannot_be_kept_is_refused_with_the_reason(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaRefused, match=said):
        grammar_of(schema)
