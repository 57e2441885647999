"""`/docs`: the API's own document as a page. FastAPI's page takes its script from elsewhere, and is blank without a way out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from jinja2 import Environment

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
code, h3 { font-family: ui-monospace, monospace } h3 { margin: 2rem 0 0 } p { margin: .3rem 0 }
td { padding: .1rem 1rem .1rem 0; vertical-align: top }
</style>
<h1>{{ title }}</h1>
<p>The OpenAI API for fine-tuning, files and inference: any program written for it works here. This page in full, for programs:
<a href="openapi.json">openapi.json</a>.</p>
{% for entry in entries %}
<h3>{{ entry.title }}</h3>
<p>{{ entry.about }}</p>
<table>
{% for field in entry.fields %}
<tr><td><code>{{ field.name }}</code></td><td>{{ field.kind }}</td><td>{{ "required" if field.is_required }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
""")


@dataclass(frozen=True)
class Field:
    name: str
    kind: str
    is_required: bool


@dataclass(frozen=True)
class Entry:
    """An operation with the fields of its path, query and body; or an object that others are made of."""

    title: str
    about: str
    fields: tuple[Field, ...]


def register(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    def show_manual() -> HTMLResponse:
        return HTMLResponse(_PAGE.render(title=app.title, entries=_entries(app.openapi())))


def _entries(document: dict[str, Any]) -> Iterator[Entry]:
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            fields = (*_parameters(told), *_body(told, schemas))
            yield Entry(f"{method.upper()} {path}", told.get("description") or told["summary"], fields)
    for name, schema in schemas.items():
        about = schema.get("description") or (_kind(schema) if "enum" in schema else "")
        yield Entry(name, about, tuple(_properties(schema)))


def _parameters(told: dict[str, Any]) -> Iterator[Field]:
    for parameter in told.get("parameters", ()):
        yield Field(parameter["name"], _kind(parameter["schema"]), parameter["required"])


def _body(told: dict[str, Any], schemas: dict[str, Any]) -> Iterator[Field]:
    for content in told.get("requestBody", {}).get("content", {}).values():
        schema = content["schema"]
        yield from _properties(schemas[_name(schema)] if "$ref" in schema else schema)


def _properties(schema: dict[str, Any]) -> Iterator[Field]:
    for name, field in schema.get("properties", {}).items():
        yield Field(name, _kind(field), name in schema.get("required", ()))


def _kind(schema: dict[str, Any]) -> str:
    """A type in words: `string or integer`, `list of ChatMessage`."""
    if "$ref" in schema:
        return _name(schema)
    if branches := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(map(_kind, branches)))
    if "const" in schema or "enum" in schema:
        return " or ".join(f"“{value}”" for value in schema.get("enum", (schema.get("const"),)))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]
