"""From a YAML file and ``key=value`` words to a frozen :class:`~certprune.config.Recipe`, and back.

``extends: other.yaml`` (relative to the file that says so) lays a recipe over another. Numbers may be written
``1e-3`` or as a fraction, ``2/255``, so that an eps need not be rounded by hand.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from certifiers.errors import InputError
from certprune.config import Recipe, merged_keys


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 and 2/255 as numbers and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    top, _, bottom = loader.construct_scalar(node).replace("_", "").partition("/")
    if bottom and float(bottom) == 0:
        raise yaml.constructor.ConstructorError(None, None, "a fraction with 0 below", node.start_mark)
    return float(top) / float(bottom) if bottom else float(top)


_Loader.add_implicit_resolver(
    "!number",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+|\s*/\s*\d+(?:\.\d*)?)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("!number", _number)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at ``path`` with ``overrides`` (``"pretrain.epochs=2"``) laid over it.

    Raises :class:`InputError` with every mistake there is.
    """
    path = Path(path)
    content = _read(path, ())
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str = "the recipe") -> Recipe:
    """The recipe that ``content`` describes; ``source`` stands first in the error's message."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False)
        deeper = {detail["loc"][:-1] for detail in details}  # a list whose items are wrong also counts as too short
        lines = [_sentence(d, content) for d in details if not (d["type"] == "too_short" and d["loc"] in deeper)]
        lines = [line for line in lines if line]
        count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise InputError(f"{source} has {count}:\n" + "\n".join(f"- {line}" for line in lines)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; :func:`load_recipe` gives the same recipe back."""
    content = recipe.model_dump(mode="json")
    for variant in content["variants"]:
        if variant["dense"]:
            for key in ("criterion", "sparsity", "budget"):
                del variant[key]
        else:
            del variant["dense"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What would train other weights: one ``key: old -> new`` a line.

    Free to change are the name and the folder, the machine's settings, what is certified, and variants added to those
    there.
    """
    free = {"name", "output", "device", "threads", "certify", "variants"}
    was, now = (recipe.model_dump(mode="json", exclude=free) for recipe in (old, new))
    for recipe, content in ((old, was), (new, now)):
        content["variants"] = {v.name: v.model_dump(mode="json") for v in recipe.variants}
    now["variants"] = {name: now["variants"].get(name) for name in was["variants"]}
    was, now = _flat(was), _flat(now)
    return [
        f"{key}: {_show(was.get(key))} -> {_show(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The YAML mapping at ``path`` laid over the one it extends."""
    if path.resolve() in above:
        chain = " -> ".join(str(p) for p in (*above, path.resolve()))
        raise InputError(f"Recipes extend each other in a circle: {chain}. Remove one of the extends: lines.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError as error:
        wanted = f", which {above[-1]} extends" if above else ""
        raise InputError(
            f"There is no recipe {path}{wanted}. Give the path of a YAML file, e.g. one of configs/."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {path} cannot be read ({error}). Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The recipe {path} is not valid YAML: {_flat_text(error)}. Mend that line.") from error
    if not isinstance(content, dict):
        raise InputError(f"The recipe {path} must hold `key: value` lines, but it holds {_kind(content)}.")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends must be the path of another recipe, but {_show(parent)} came.")
    return merged_keys(_read(path.parent / parent, (*above, path.resolve())), content)


def _override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key in place, making the steps to it; the schema judges them afterwards."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"A setting is written key=value, e.g. pretrain.epochs=2, but {override!r} came.")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"The value in {override!r} is not valid YAML: {_flat_text(error)}.") from error
    steps = key.split(".")
    at: Any = content
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(at, list):
            if not step.isdigit() or int(step) >= len(at):
                where = ".".join(steps[:number])
                raise InputError(
                    f"{override!r}: {where} is a list of {len(at)}, so {step!r} must be one of its places, "
                    f"counted "
                    f"from 0."
                )
            step = int(step)
        elif not isinstance(at, dict):
            raise InputError(f"{override!r}: {'.'.join(steps[:number])} is {_show(at)}, which has no keys below it.")
        if last:
            at[step] = value
        elif isinstance(at, list) or at.get(step) is not None:
            at = at[step]
        else:
            at[step] = {}
            at = at[step]


# --- the wording of mistakes
# ---------------------------------------------------------------------------------

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
        return f"{key} must be {words} {context[name]:g}, but {_show(came)} came.{_hint(key)}"
    if kind == "string_pattern_mismatch":
        return f"{key} names a folder: letters, digits and . _ + - only, but {_show(came)} came."
    if kind == "too_short":
        return f"{key} must not be empty."
    if kind == "value_error":
        return f"{key}: {_flat_text(context['error'])}"
    if kind in _EXPECTED:
        return f"{key} must be {_EXPECTED[kind]}, but {_kind(came)} came: {_show(came)}.{_hint(key)}"
    return f"{key}: {detail['msg']}, but {_show(came)} came."


def _hint(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "sparsity":
        return " Sparsity is the fraction of weights removed, e.g. 0.95."
    if leaf in ("methods", "eps", "milestones", "layers", "exclude"):
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
        return f"{key} must be a mapping with a name, but {_show(came)} came."
    value = came.get("name") if isinstance(came, dict) else came
    name = f"{key}.name" if kind == "union_tag_invalid" else key
    near = difflib.get_close_matches(str(value), expected.split(", "), n=1)
    maybe = f" Did you mean {near[0]}?" if near else ""
    return f"{name} must be one of {expected}, but {_show(value)} came.{maybe}"


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


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
             tuple: "a list", dict: "a mapping", type(None): "nothing"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat_text(error: object) -> str:
    return " ".join(str(error).split())


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict) and content:
        return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: content}
