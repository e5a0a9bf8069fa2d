"""The user's own code by ``package.module:name``: found, imported and checked, with a sentence where that fails.

It is imported in the worker, after the fork from the zygote. It is looked for like any module, then in the folders that
LOCKSTEP_MODULE_PATH names: ``lockstep run`` puts the manifest's folder and the working directory there. They come last,
so that a file of the user's can't take the place of a module of torch or of the standard library.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lockstep_trainer.errors import UserError

PATH_VARIABLE = "LOCKSTEP_MODULE_PATH"
_SHOWN = 12


def load(reference: str, field: str) -> Any:
    """The object that ``reference`` names; raises UserError naming ``field`` where there is none."""
    module_name, _, name = reference.partition(":")
    module = _import(module_name, field)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{field}: {_where(module)} has no {name!r}; {_has(module, name)}") from None


def load_callable(reference: str, field: str) -> Callable[..., Any]:
    """A function or class by name; raises UserError."""
    found = load(reference, field)
    if not callable(found):
        raise UserError(f"{field}: {reference} is a {type(found).__name__}; name a function or a class")
    return found  # type: ignore[no-any-return]


def call(function: Callable[..., Any], field: str, *positional: Any, **named: Any) -> Any:
    """``function(*positional, **named)``; raises UserError where it does not take these arguments.

    What the function itself raises is passed on as it is: its traceback is the user's best help.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function(*positional, **named)  # some built-in types have none
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise UserError(
            f"{field}: {_name(function)} does not take these arguments: {error}; {_takes(signature)}"
        ) from None
    return function(*positional, **named)


def _takes(signature: inspect.Signature) -> str:
    return f"it takes {signature}" if signature.parameters else "it takes none"


def _import(name: str, field: str) -> ModuleType:
    for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()  # they date from the zygote's start
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise UserError(
                f"{field}: there is no module {missing!r}; put it into the image, or mount its folder and name that in "
                f"PYTHONPATH in the pod template; `lockstep run` looks beside the manifest and in the working directory"
            ) from None
        raise UserError(
            f"{field}: {name} can't be imported, for it needs the module {missing!r}; install that in the image"
        ) from None
    except Exception as error:
        raise UserError(f"{field}: {name} can't be imported: {_place(error)}{type(error).__name__}: {error}") from error


def _place(error: Exception) -> str:
    """Where in the user's file it happened."""
    if isinstance(error, SyntaxError):
        return ""  # its text says it
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if len(frames) > 1 else ""


def _where(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return f"{module.__name__} ({file})" if file else module.__name__


def _has(module: ModuleType, wanted: str) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]  # fmt: skip
    close = difflib.get_close_matches(wanted, own, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"it has {', '.join(sorted(own)[:_SHOWN])}" if own else "it defines nothing"


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', function)}"
