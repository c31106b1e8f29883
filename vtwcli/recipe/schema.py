"""The JSON schema of recipe files, for editors."""

from __future__ import annotations

from typing import Any

from vtwcli.recipe.recipe import Recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, short forms and empty sections included."""
    schema = Recipe.model_json_schema()
    sections = schema["properties"]
    for name, part in sections.items():
        choices = part.pop("anyOf", None) or [
            {key: part.pop(key) for key in ("$ref", "type", "items") if key in part}
        ]
        part.pop("default", None)
        short = [{"type": "string"}] if name == "model" else []
        sections[name] = {
            "anyOf": [*short, *(c for c in choices if c != {"type": "null"}), {"type": "null"}],
            **part,
        }
    [data] = [choice for choice in sections["data"]["anyOf"] if "items" in choice]
    data["items"] = {"anyOf": [{"type": "string"}, data["items"]]}
    schema["$defs"]["DataSpec"]["properties"]["tasks"]["anyOf"].append({"type": "string"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Recipe of vtw"}
