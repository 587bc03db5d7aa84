"""This module loads functions of the user's own, which a configuration names "file.py:function" or
"package.module:function".

A file is looked for beside the configuration. Loading a function runs the user's code, so it happens where that code
belongs: rewards in their workers, parts of the objective in the training ranks. Everything else here only reads names.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rl.parsing import meant

_NAME = re.compile(r"(?P<place>[^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
_LAST_LINES = 3  # of a traceback, in a message
_LINE_CHARACTERS = 120
# A parameter with a default that is as near as this to a name that is known is probably a misspelt one.
_LIKE = 0.8
# Where code lies that is not the user's: this package, Python's library, and what pip has installed.
_NOT_THE_USERS = tuple(
    f"{folder}{os.sep}"
    for folder in {str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))}
)


def is_own(name: str) -> bool:
    """Tell whether this names a function of the user's own."""
    return _NAME.fullmatch(name) is not None


def beside(name: str, folders: Iterable[Path]) -> str:
    """Return the name with the file's whole path: in the first of the folders, or else the working directory, that has
    the file. Where none has it, it is in the first folder."""
    place, _, function = name.rpartition(":")
    if not place.endswith(".py") or Path(place).is_absolute():
        return name
    here = [*folders, Path()]
    found = next((folder / place for folder in here if (folder / place).is_file()), here[0] / place)
    return f"{os.path.abspath(found)}:{function}"


def source_digest(name: str) -> str:
    """Return a digest of the file that the function is in, 16 hexadecimal digits; "" where the file cannot be found.
    What the file imports does not count."""
    place, _, _ = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path: str | None = place
        else:
            spec = importlib.util.find_spec(place.partition(".")[0])
            root = spec.submodule_search_locations if spec else None
            path = spec.origin if spec else None
            if root and "." in place:
                inner = Path(root[0], *place.split(".")[1:])
                path = str(inner.with_suffix(".py") if inner.with_suffix(".py").is_file() else inner / "__init__.py")
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()[:16]
    except (OSError, ImportError, ValueError):
        return ""


def load_function(name: str, where: str) -> Callable[..., Any]:
    """Import the function, which runs the code of its file. where: the key that names it, for messages.

    ValueError for a file or module that is not there or does not import, and for a function that it does not have.
    """
    place, _, function = name.rpartition(":")
    try:
        module = _of_file(Path(place), where) if place.endswith(".py") else _of_module(place, where)
    except ValueError:
        raise
    except SyntaxError as error:
        line = (error.text or "").strip()[:_LINE_CHARACTERS]
        raise ValueError(
            f"{where}: {error.filename} line {error.lineno} is no Python ({error.msg}): {line!r}; mend it"
        ) from None
    except BaseException as error:  # the user's code runs: it may end the process, too
        raise ValueError(f"{where}: importing {place} failed: {last_lines(error)}") from None
    found = getattr(module, function, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{where}: {place} has no function {function!r}; it has {', '.join(known) or 'none'}"
            f"{meant(function, known)}"
        )
    if not callable(found):
        raise ValueError(f"{where}: {function!r} of {place} is no function but {type(found).__name__}; name a function")
    return found


def _of_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"{where} names the file {path}, which does not exist; it is looked for beside the configuration"
        )
    _look_in(str(path.parent))
    # A name of its own: rewards.py or math.py may be the name of a module that others import.
    name = f"own_function_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _of_module(name: str, where: str) -> ModuleType:
    _look_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # something that the module imports
        raise ValueError(
            f"{where} names the module {name!r}, and there is no {error.name!r} to import; install its package, or "
            "write the path of a file, file.py:function"
        ) from None


def _look_in(folder: str) -> None:
    """Let imports find the neighbours of a file. The folder comes behind everything else, so that no neighbour takes
    the place of a library."""
    if folder not in sys.path:
        sys.path.append(folder)


def parameters_of(function: Callable[..., Any], known: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Return the names of the `known` values that a function wants to be called with. `known` says what each is.

    ValueError with the whole list for a name that is not known. A parameter with a default may have any name that is
    not like a known one; `**` takes all of them.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: Python cannot tell the parameters of {function!r}; write a function around it"
        ) from None
    wanted = []
    for parameter in parameters:
        name, kind = parameter.name, parameter.kind
        if kind is parameter.VAR_KEYWORD:
            return tuple(known)
        if kind is parameter.VAR_POSITIONAL:
            continue
        if kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{where}: parameter {name!r} is positional-only, and all are passed by name; drop the '/'"
            )
        if name in known:
            wanted.append(name)
        elif parameter.default is parameter.empty or difflib.get_close_matches(name, known, n=1, cutoff=_LIKE):
            listed = "\n".join(f"  {one}: {about}" for one, about in known.items())
            hint = meant(name, known) or "."
            raise ValueError(f"{where}: nothing is called {name!r}{hint} Parameters may be\n{listed}")
    return tuple(wanted)


def last_lines(error: BaseException, callers: Collection[str] = ()) -> str:
    """Say for a message what was raised, and the last places of the user's code that it came through. Of a group of
    exceptions it says the first one too. Where no place is the user's, those of libraries are said. callers: files that
    are not the user's."""
    chain = [error]
    while isinstance(chain[-1], BaseExceptionGroup):
        chain.append(chain[-1].exceptions[0])
    said = ": ".join(f"{type(one).__name__}: {one}".rstrip(": ") for one in chain).splitlines()
    frames = [frame for one in chain for frame in traceback.extract_tb(one.__traceback__)]
    frames = [f for f in frames if f.filename not in (__file__, *callers) and not f.filename.startswith("<frozen")]
    frames = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)] or frames
    places = [
        f"{Path(f.filename).name} line {f.lineno} in {f.name}: {_line(f.filename, f.lineno)}"
        for f in reversed(frames[-_LAST_LINES:])
    ]
    return " < ".join([" ".join(said)[: 2 * _LINE_CHARACTERS], *places])


def _line(path: str, number: int | None) -> str:
    return linecache.getline(path, number or 0).strip()[:_LINE_CHARACTERS]
