"""JSON answers: a schema as the grammar that an answer is held to (llguidance). The gateway checks it, engines compile it."""

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

MAX_CHARACTERS = 64 * 1024
# white space as people write JSON, but never without end: a small model would not stop
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,20}"


class SchemaRefused(ValueError):
    """What is wrong with the schema, in words for its author."""


def grammar_of(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that the schema accepts. Raises SchemaRefused."""
    said = json.dumps(schema)
    if len(said) > MAX_CHARACTERS:
        raise SchemaRefused(f"it has {len(said)} characters, of which {MAX_CHARACTERS} are accepted")
    try:
        grammar = LLMatcher.grammar_from_json_schema(said, defaults={"whitespace_pattern": _WHITE_SPACE})
    except ValueError as error:
        raise SchemaRefused(str(error)) from error
    if problem := LLMatcher.validate_grammar(grammar):
        raise SchemaRefused(" ".join(problem.split())[:300])
    return grammar
