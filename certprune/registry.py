"""What every registry needs: unknown names, options against a signature, and the user's own callables.

A registry is a plain dict from a name to a callable. Everything here turns a slip of the user's into an
:class:`~certifiers.errors.InputError` that says what was expected, what came and what to do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping

from certifiers.errors import InputError


def unknown_name(kind: str, name: object, known: Iterable[str], more: str = "") -> InputError:
    """The error for a name that is in no registry: lists the known ones and suggests the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}{more}.")


def look_up(kind: str, name: object, registry: Mapping[str, object]):
    """`registry[name]`, or the error of :func:`unknown_name`."""
    if not isinstance(name, str) or name not in registry:
        raise unknown_name(kind, name, registry)
    return registry[name]


def option_names(function: Callable, positional: int) -> list[str] | None:
    """Names of the options that `function` takes beyond its first `positional` arguments.

    None when it takes any option (`**kwargs`) or when it shows no signature.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    before = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    return named[max(positional - before, 0) :]


def check_options(function: Callable, options: Mapping[str, object], what: str, positional: int = 0) -> None:
    """Raise an InputError if `function` does not take every option; `what` names it in the message."""
    known = option_names(function, positional)
    if known is None:
        return
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(known) if known else "no options"
            raise InputError(f"{what} has no option {option!r}.{hint} It takes: {listed}.")


def is_import_path(name: object) -> bool:
    """Whether `name` is written as "package.module:callable"."""
    return isinstance(name, str) and ":" in name


def import_callable(path: str, what: str) -> Callable:
    """The callable that "package.module:callable" names; modules in the working folder are found too.

    Raises an InputError when the module or the name is missing, when the module fails while it is imported,
    or when what is found cannot be called. `what` says in the message what it was wanted for.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{what} must be written as 'package.module:callable', but {path!r} came.")
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        # Appended, so that nothing in the working folder shadows an installed package.
        sys.path.append(folder)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise InputError(
                f"{what} {path!r}: there is no module {missing!r}. Install its package, or start from the "
                f"folder that holds it (searched: the installed packages and {folder})."
            ) from error
        raise InputError(
            f"{what} {path!r}: the module needs {missing!r}, which is not installed. Install it first."
        ) from error
    except Exception as error:
        raise InputError(
            f"{what} {path!r}: importing {module_name!r} failed with {type(error).__name__}: {error}. "
            "Mend the module, then run again."
        ) from error
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{what} {path!r}: the module {module_name!r} has no {part!r}.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{what} {path!r} must name a callable, but it is a {type(found).__name__}.")
    return found
