#!/usr/bin/env python3
"""Reduces published OpenAPI documents to what the tests need.

Run by hand, with PyYAML installed, when a newer document is wanted:

    python3 tests/specs/extract.py assistants <document.yaml> > tests/specs/assistants.json
    python3 tests/specs/extract.py responses <document.yaml> > tests/specs/responses.json

The documents are those of github.com/openai/openai-openapi: `assistants` was made from the hand-kept revision of
2025-04-29, `responses` from that of 2026-08-21. The output holds facts alone: paths, methods, status codes and the
schemas that they reach, as JSON Schema 2020-12. What becomes of the rest:

- descriptions, titles, examples, defaults, deprecations and `x-` fields are dropped;
- `nullable: true` becomes a union with null;
- an `allOf` with a lone `nullable: true` becomes a union with null too;
- discriminators are dropped, and `oneOf` becomes `anyOf`, because the branches of these unions overlap;
- `format` is dropped: formats such as `unixtime` are not JSON Schema's;
- keywords beside a `$ref` are dropped; the documents have none there that restrict.
"""

import json
import re
import sys

import yaml

WANTED = {
    "assistants": {
        "paths": r"^/threads(/|$)",
        "events": "AssistantStreamEvent",
    },
    "responses": {
        "paths": r"^/(conversations|responses)(/(\{conversation_id\}|\{response_id\})(/(items(/\{item_id\})?|cancel|input_items))?)?$",
        "events": "ResponseStreamEvent",
    },
}
METHODS = ("get", "post", "delete")
DROPPED = {
    "description", "title", "example", "examples", "default", "deprecated", "discriminator", "format", "externalDocs",
    "nullable", "readOnly", "writeOnly",
}
REF = "#/components/schemas/"


def convert(node, named=False):
    """A schema as JSON Schema 2020-12. `named`: the keys of `node` are names, not keywords."""
    if isinstance(node, list):
        return [convert(item) for item in node]
    if not isinstance(node, dict):
        return node
    if named:
        return {name: convert(value) for name, value in node.items()}
    out = {}
    for key, value in node.items():
        if key in DROPPED or key.startswith("x-"):
            continue
        if key == "allOf" and any(item.get("nullable") and len(item) == 1 for item in value):
            # A null that `allOf` would forbid, but that the document means.
            rest = [item for item in value if not item.get("nullable")]
            out["anyOf"] = [{"allOf": convert(rest)}, {"type": "null"}]
        elif key == "oneOf":
            out["anyOf"] = convert(value)
        elif key in ("properties", "patternProperties"):
            out[key] = convert(value, named=True)
        elif key in ("enum", "const", "required"):
            out[key] = value
        elif key == "$ref":
            out[key] = "#/$defs/" + value.removeprefix(REF)
        elif key == "$recursiveAnchor":
            continue
        elif key == "$recursiveRef":
            # Means the nearest schema with an anchor; there is one only.
            out["$ref"] = "#/$defs/CompoundFilter"
        elif key in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            continue
        else:
            out[key] = convert(value)
    if "$ref" in out and not node.get("nullable"):
        return {"$ref": out["$ref"]}
    if node.get("nullable"):
        if "enum" in out and None in out["enum"]:
            out["enum"] = [value for value in out["enum"] if value is not None]
        return {"anyOf": [out, {"type": "null"}]}
    return out


def reached(node, found, schemas):
    """Collects the names of all schemas that `node` refers to, directly or not."""
    if isinstance(node, list):
        for item in node:
            reached(item, found, schemas)
    elif isinstance(node, dict):
        target = node.get("$ref")
        if isinstance(target, str):
            name = target.removeprefix("#/$defs/")
            if name not in found:
                found[name] = None
                found[name] = convert(schemas[name])
                reached(found[name], found, schemas)
        for value in node.values():
            reached(value, found, schemas)


def main():
    kind, path = sys.argv[1:]
    wanted = WANTED[kind]
    with open(path, encoding="utf-8") as file:
        document = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schemas = document["components"]["schemas"]
    operations = {}
    for path_template, methods in sorted(document["paths"].items()):
        if not re.match(wanted["paths"], path_template):
            continue
        for method in METHODS:
            operation = methods.get(method)
            if operation is None:
                continue
            entry = {"responses": {}}
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                entry["request"] = convert(body)
            for status, answer in operation.get("responses", {}).items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema")
                entry["responses"][str(status)] = convert(schema) if schema is not None else None
            operations[f"{method.upper()} {path_template}"] = entry
    events = {"$ref": f"#/$defs/{wanted['events']}"}
    error = {"$ref": "#/$defs/ErrorResponse"}
    found = {}
    reached([operations, events, error], found, schemas)
    version = document["info"]["version"]
    source = f"github.com/openai/openai-openapi, {re.search(r'[0-9]{4}-[0-9]{2}-[0-9]{2}', sys.argv[2]).group()}"
    out = {
        "source": source,
        "version": str(version),
        "made_by": "tests/specs/extract.py",
        "operations": operations,
        "event": events,
        "error": error,
        "$defs": dict(sorted(found.items())),
    }
    json.dump(out, sys.stdout, ensure_ascii=True, separators=(",", ":"), sort_keys=False)
    sys.stdout.write("\n")


main()
