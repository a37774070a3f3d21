"""From a YAML file and ``key=value`` words to a frozen :class:`~certprune.config.Recipe`, and back.

``extends: other.yaml`` (relative to the file that says so) lays a recipe over another. Numbers may be written
``1e-3`` or as a fraction, ``2/255``, so that an eps need not be rounded by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from certifiers.errors import InputError
from certprune.config import Recipe, merged_keys, trained_under_noise
from certprune.mistakes import kind_of, one_line, sentences, show
from certprune.stage_settings import SAME_WEIGHTS, SpeedSettings
from certprune.variant_names import USUAL


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


# YAML 1.1 reads 2:4 as a number to base 60, which nobody means: here whole numbers have no colon.
_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INT]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
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
    return parse_recipe(_read(path, ()), str(path), overrides)


def parse_recipe(content: dict[str, Any], source: str = "the recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``content`` describes, with ``overrides`` laid over it in place; ``source`` stands first in the
    error's message."""
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = sentences(error, content)
        count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise InputError(f"{source} has {count}:\n" + "\n".join(f"- {line}" for line in lines)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; :func:`load_recipe` gives the same recipe back."""
    content = recipe.model_dump(mode="json")
    for variant in content["variants"]:
        if variant["dense"]:
            for key in ("criterion", "sparsity", "budget", *USUAL):
                del variant[key]
        else:
            del variant["dense"]
            for key in [key for key, usual in USUAL.items() if variant[key] == usual]:
                del variant[key]
        if variant["objective"] is None:
            del variant["objective"]
    if recipe.speed == SpeedSettings():
        del content["speed"]
    if not recipe.sync_batch_norm:
        del content["sync_batch_norm"]
    if recipe.certify.smoothing is None and not trained_under_noise(recipe.objective):
        del content["certify"]["smoothing"]  # the default there; where it is not, null says that it is off
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What would train other weights: one ``key: old -> new`` a line.

    Free to change are the name and the folder, the machine's settings, what is certified, and variants added to those
    there.
    """
    free = dict.fromkeys(("name", "output", "device", "threads", "certify", "variants"), True)
    free["speed"] = set(SAME_WEIGHTS)
    was, now = (recipe.model_dump(mode="json", exclude=free) for recipe in (old, new))
    for recipe, content in ((old, was), (new, now)):
        content["variants"] = {v.name: v.model_dump(mode="json") for v in recipe.variants}
    now["variants"] = {name: now["variants"].get(name) for name in was["variants"]}
    was, now = _flat(was), _flat(now)
    return [
        f"{key}: {show(was.get(key))} -> {show(now.get(key))}"
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
        raise InputError(f"The recipe {path} is not valid YAML: {one_line(error)}. Mend that line.") from error
    if not isinstance(content, dict):
        raise InputError(f"The recipe {path} must hold `key: value` lines, but it holds {kind_of(content)}.")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends must be the path of another recipe, but {show(parent)} came.")
    return merged_keys(_read(path.parent / parent, (*above, path.resolve())), content)


def _override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key in place, making the steps to it; the schema judges them afterwards."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"A setting is written key=value, e.g. pretrain.epochs=2, but {override!r} came.")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"The value in {override!r} is not valid YAML: {one_line(error)}.") from error
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
            raise InputError(f"{override!r}: {'.'.join(steps[:number])} is {show(at)}, which has no keys below it.")
        if last:
            at[step] = value
        elif isinstance(at, list) or at.get(step) is not None:
            at = at[step]
        else:
            at[step] = {}
            at = at[step]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict) and content:
        return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: content}
