"""Builds handlers and other components from configuration: `{"path" | "name": …, "args": {…}}`.

A configuration is code, for a module that it names is imported, and importing a module runs it. What it cannot do is to
have any class of any installed package called: a class is checked before it is, and before its arguments are built.
"""

import importlib
import inspect
import json
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_learn.errors import ConfigError, as_failure, described, text_of

ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "handler": (("handle_event", "rollback"),),
    "aggregator": (("process",),),
    "filter": (("apply",), ("process",)),
}
"""Which methods a class must have to be one, whatever it derives from; where there are several ways, one is enough."""


def build_component(
    entry: object, known: Mapping[str, type], supplies: Mapping[str, Any] | None = None, role: str | None = None
) -> Any:
    """Builds one component.

    Nothing tells what a component in an argument has to be. So it must be of a class of this library, or of one that
    derives from such a class, or of the user's own code: a module that is neither Python's nor of an installed package.

    Args:
        entry: `{"name": …}` for one of `known`, or `{"path": "package.module.Class"}`; `"args"` are its keyword
            arguments, in which components may nest.
        known: The classes that go by a bare name.
        supplies: Arguments that the job provides where the class takes them and `"args"` leaves them out.
        role: One of `ROLES`; None: that of a component in an argument.

    Raises:
        ConfigError: The entry is malformed, the class cannot be found, is not what it must be, or does not take the
            arguments.

    Example:
        >>> from fed_learn.handlers import ModelSelectionHandler
        >>> entry = {"name": "ModelSelectionHandler", "args": {"mode": "min", "validation_metric_name": "initial_loss"}}
        >>> build_component(entry, {"ModelSelectionHandler": ModelSelectionHandler}).mode
        'min'
    """
    if not isinstance(entry, dict) or ("name" in entry) == ("path" in entry):
        raise ConfigError(f"a component needs either 'name' or 'path', and 'args': {json.dumps(entry)}")
    unknown = sorted(set(entry) - {"name", "path", "args"})
    if unknown:
        raise ConfigError(f"a component has keys {unknown} beside 'name', 'path' and 'args': {json.dumps(entry)}")
    if "name" in entry:
        cls = known.get(entry["name"]) if isinstance(entry["name"], str) else None
        if cls is None:
            raise ConfigError(f"no component is named {entry['name']!r}; known are {', '.join(sorted(known))}")
    else:
        cls = _import(entry["path"])
        _check_class(cls, role)
    args = entry.get("args", {})
    if not isinstance(args, dict):
        raise ConfigError(f"'args' of {cls.__name__} must be an object of keyword arguments, not {json.dumps(args)}")
    built = {key: _nested(value, known, supplies) for key, value in args.items()}
    try:
        signature = inspect.signature(cls)
        built |= {k: v for k, v in (supplies or {}).items() if k in signature.parameters and k not in built}
        signature.bind(**built)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} cannot be built from {sorted(built)}: {text_of(error)}") from error
    try:
        return cls(**built)
    except BaseException as error:
        as_failure(error)
        raise ConfigError(f"{cls.__name__} cannot be built: {described(error)}") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object; its folder becomes importable, so that classes beside the file can be named by path.

    So does a folder `custom` beside that of the file, where Clara Train's projects keep their code.

    Raises:
        ConfigError: The file cannot be read, holds no JSON object, or one in which a key is there twice.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a mark.
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a JSON {type(config).__name__}, not an object")
    folder = Path(path).resolve().parent
    for place in (folder, folder.parent / "custom"):
        if place.is_dir() and str(place) not in sys.path:
            sys.path.append(str(place))
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which JSON's reader would silently keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return found


def _nested(value: Any, known: Mapping[str, type], supplies: Mapping[str, Any] | None) -> Any:
    """Builds the components in an argument, in lists too; leaves everything else as it is."""
    if isinstance(value, list):
        return [_nested(item, known, supplies) for item in value]
    if not isinstance(value, dict) or not set(value) <= {"path", "name", "args"}:
        return value
    # {"name": "adam"} may be a plain argument: by name only what is known is a component.
    named = isinstance(value.get("name"), str) and value["name"] in known
    return build_component(value, known, supplies) if "path" in value or named else value


def _check_class(cls: type, role: str | None) -> None:
    """Refuses a class that is not what it must be, before anything calls it.

    Raises:
        ConfigError: Says which class, and what to do.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if role is not None and not any(all(callable(getattr(cls, m, None)) for m in way) for way in ROLES[role]):
        needed = ", or ".join(" and ".join(way) for way in ROLES[role])
        raise ConfigError(f"{name} is no {role}: it lacks {needed}")
    of_library = any(base.__module__.partition(".")[0] == "fed_learn" for base in cls.__mro__)
    of_python = cls.__module__.partition(".")[0] in sys.stdlib_module_names
    if not of_library and (of_python or (role is None and _is_installed(cls))):
        raise ConfigError(
            f"{name} is not called for a configuration: it is neither a component of fed_learn nor of your own code; "
            "to use it, derive a class from it in a module beside the file, and name that one"
        )


def _is_installed(cls: type) -> bool:
    """Whether an installed package brings the class."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    paths = sysconfig.get_paths()
    places = [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]
    return file is not None and any(Path(file).resolve().is_relative_to(Path(place).resolve()) for place in places)


def _import(path: object) -> type:
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ConfigError(f"path {path!r} must be package.module.Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except BaseException as error:  # a script may end itself when it is imported
        as_failure(error)
        raise ConfigError(f"path {path!r}: {described(error)}") from error
    if not isinstance(found, type):
        raise ConfigError(f"path {path!r} is no class")
    return found
