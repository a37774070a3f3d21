"""The wording of a recipe's mistakes: which key, what was expected, what came, what is near."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from certprune.config import Recipe


def sentences(error: ValidationError, content: dict[str, Any]) -> list[str]:
    """One sentence for each mistake in ``content``, what was read from the recipe."""
    details = error.errors(include_url=False)
    deeper = {detail["loc"][:-1] for detail in details}  # a list whose items are wrong also counts as too short
    own = [d for d in details if not (d["type"] == "too_short" and d["loc"] in deeper)]
    return [line for line in (_sentence(detail, content) for detail in own) if line]


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _sentence(detail: dict[str, Any], content: dict[str, Any]) -> str:
    """One mistake in one sentence: which key, what was expected, what came."""
    kind, came, context = detail["type"], detail["input"], detail.get("ctx", {})
    model, path = _locate(detail["loc"], content)
    key = ".".join(str(step) for step in path) or "the recipe"
    if kind == "default_factory_not_called":  # follows from another mistake, which has its own line
        return ""
    if kind == "extra_forbidden":
        return _unknown_key(path, model)
    if kind == "missing":
        return f"{key} is missing; it must be given."
    if kind in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
        return _unknown_choice(key, kind, came, context)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{key} must be {words} {context[name]:g}, but {show(came)} came.{_hint(key)}"
    if kind == "string_pattern_mismatch":
        return f"{key} names a folder: letters, digits and . _ + - only, but {show(came)} came."
    if kind == "too_short":
        return f"{key} must not be empty."
    if kind == "value_error":
        said = one_line(context["error"])
        return said if said.startswith(f"{key} ") else f"{key}: {said}"
    if kind in _EXPECTED:
        return f"{key} must be {_EXPECTED[kind]}, but {kind_of(came)} came: {show(came)}.{_hint(key)}"
    return f"{key}: {detail['msg']}, but {show(came)} came."


def _hint(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "sparsity":
        return " Sparsity is the fraction of weights removed, e.g. 0.95."
    if leaf in ("methods", "eps", "radii", "milestones", "layers", "exclude"):
        return f" Write a list: {leaf}: [.., ..]."
    return ""


def _unknown_key(path: Sequence[str | int], model: type[BaseModel] | None) -> str:
    allowed = sorted(model.model_fields) if model else []
    near = difflib.get_close_matches(str(path[-1]), allowed, n=2)
    maybe = f" Did you mean {' or '.join(near)}?" if near else ""
    where = f" in {'.'.join(map(str, path[:-1]))}" if len(path) > 1 else ""
    return f"{'.'.join(map(str, path))} is no known key.{maybe} Allowed{where}: {', '.join(allowed)}."


def _unknown_choice(key: str, kind: str, came: Any, context: dict[str, Any]) -> str:
    expected = context.get("expected", context.get("expected_tags", "")).replace("'", "").replace(" or ", ", ")
    if kind == "union_tag_not_found":
        return f"{key} must be a mapping with a name, but {show(came)} came."
    value = came.get("name") if isinstance(came, dict) else came
    name = f"{key}.name" if kind == "union_tag_invalid" else key
    near = difflib.get_close_matches(str(value), expected.split(", "), n=1)
    maybe = f" Did you mean {near[0]}?" if near else ""
    return f"{name} must be one of {expected}, but {show(value)} came.{maybe}"


def _locate(location: Iterable[str | int], content: Any) -> tuple[type[BaseModel] | None, list[str | int]]:
    """The settings class that holds the last step of ``location``, and it without pydantic's tags."""
    steps = list(location)
    model: Any = Recipe
    holder, path = model, []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        inside = isinstance(content, dict) and step in content or isinstance(content, list) and isinstance(step, int)
        if not inside and not last:  # a union's tag: stands in the location but not in the file
            continue
        holder = model
        path.append(step)
        content = content[step] if inside else None
        model = _child(model, step, content)
    return (holder if isinstance(holder, type) and issubclass(holder, BaseModel) else None), path


def _child(model: Any, step: str | int, value: Any) -> Any:
    """The settings class (or list of them) below ``model`` at ``step``."""
    if isinstance(step, int) or not hasattr(model, "model_fields"):
        return _classes(model, value)
    field = model.model_fields.get(step)
    return _classes(field.annotation, value) if field else None


def _classes(annotation: Any, value: Any) -> Any:
    found = [c for c in _leaves(annotation) if isinstance(c, type) and issubclass(c, BaseModel)]
    for candidate in found:
        tags = get_args(candidate.model_fields["name"].annotation) if "name" in candidate.model_fields else ()
        if isinstance(value, dict) and value.get("name") in tags:
            return candidate
    return found[0] if found else None


def _leaves(annotation: Any) -> list[Any]:
    if get_origin(annotation) is None:
        return [annotation]
    return [leaf for part in get_args(annotation) for leaf in _leaves(part)]


def kind_of(value: Any) -> str:
    """What a YAML value is, in words."""
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        type(None): "nothing",
    }
    return kinds.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """A value as it stands in a recipe, cut to a length that fits a sentence."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: object) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
