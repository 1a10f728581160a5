"""What decides a verifier's verdicts, as text that is the same in every process: verdicts are reused where it is.

Of a verifier of this package that is its settings and the versions of what it uses. Of one's own callable it is its
code with all that it holds (defaults, closure, the instance it is bound to, the globals it names), down to objects of
other people's classes, which `datasets` hashes as it does for its cache; the source of every module of the user's own
that is reached from there by imports; and the versions of installed packages that are. What it reads while it runs
(files, the environment, a service) is not known.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from hf_coverage import __version__
from hf_coverage.decode.verifiers import Verifier
from hf_coverage.inference.fingerprint import digest

__all__ = ["verifier_key"]

_PACKAGE = __name__.partition(".")[0]


def verifier_key(verifier: Callable[..., Any]) -> list[Any]:
    """Everything known that decides a verifier's verdicts, but for what it is given.

    Args:
        verifier: A `Verifier` or any callable.

    Returns:
        JSON-serialisable parts, equal in two processes where the verdicts are.

    Raises:
        TypeError: If it holds something that cannot be hashed, such as a generator or a connection.
    """
    if isinstance(verifier, Verifier) and type(verifier).__module__.partition(".")[0] == _PACKAGE:
        return verifier.key()
    importlib.invalidate_caches()  # a module may have been written a moment ago
    walk = _Walk()
    try:
        content = digest(walk.describe(verifier))
    except Exception as error:  # pickling raises whatever the methods of what it holds raise
        raise TypeError(f"{type(error).__name__}: {error}") from error
    own = getattr(verifier, "__module__", None) or type(verifier).__module__
    sources, versions = _reached(walk.modules, own)
    return [{"content": content, "python": platform.python_version(), "sources": sources, "versions": versions}]


class _Walk:
    """Describes an object by all that it is made of, down to what is not the user's own, and notes the modules."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._seen: dict[int, Any] = {}  # the objects too, so that no other one gets the place of one that is gone

    def describe(self, value: Any) -> Any:
        """JSON-serialisable, and the same in every process."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return [type(value).__name__, repr(value)]
        if id(value) in self._seen:  # a function that calls itself, an instance that holds itself
            return ["seen", list(self._seen).index(id(value))]
        self._seen[id(value)] = value
        if isinstance(value, types.ModuleType):
            return ["module", self._note(value.__name__)]
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(self.describe, value)]
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted(json.dumps(_Walk.describe(self._apart(), item)) for item in value)]
        if type(value) is dict:
            return ["dict", *([self.describe(key), self.describe(item)] for key, item in value.items())]
        if isinstance(value, functools.partial):
            return ["partial", *map(self.describe, (value.func, value.args, value.keywords))]
        if isinstance(value, types.MethodType):
            return ["method", self.describe(value.__func__), self.describe(value.__self__)]
        if isinstance(value, (types.FunctionType, type)):
            return self._definition(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, (property, staticmethod, classmethod)):
            parts = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
            return [type(value).__name__, *map(self.describe, parts)]
        return self._instance(value)

    def _definition(self, value: Any) -> Any:
        """A function or a class: by its name where it is installed, else by what it is made of."""
        name = [self._note(value.__module__), value.__qualname__]
        if not _is_own(value.__module__):
            return name
        if isinstance(value, type):
            members = {key: item for key, item in vars(value).items() if key not in _OF_EVERY_CLASS}
            return ["class", name, self.describe(value.__bases__), self.describe(members)]
        cells = [_content_of(cell) for cell in value.__closure__ or ()]
        used = {key: value.__globals__[key] for key in sorted(_names(value.__code__)) if key in value.__globals__}
        held = (value.__code__, value.__defaults__, value.__kwdefaults__, vars(value), cells, used)
        return ["function", name, *map(self.describe, held)]

    def _code(self, code: types.CodeType) -> Any:
        self.modules |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
        return ["code", code.co_code.hex(), code.co_exceptiontable.hex() if sys.version_info >= (3, 11) else ""] + [
            self.describe(part) for part in (*names, code.co_consts)
        ]

    def _instance(self, value: Any) -> Any:
        kind = type(value)
        plain = all(getattr(kind, name, None) is getattr(object, name, None) for name in _PICKLED_BY)
        if plain and _is_own(kind.__module__) and hasattr(value, "__dict__"):
            return ["instance", self.describe(kind), self.describe(vars(value))]
        self._note(kind.__module__)
        if isinstance(value, types.BuiltinFunctionType):
            return [kind.__name__, value.__qualname__, self.describe(value.__self__)]
        return [kind.__name__, *([self.describe(kind)] if _is_own(kind.__module__) else []), Hasher.hash(value)]

    def _apart(self) -> _Walk:
        """A walk for one item of a set, which has no place among what was seen; its modules count."""
        walk = _Walk()
        walk.modules = self.modules
        return walk

    def _note(self, module: str | None) -> str:
        if module is not None and module != "__main__":
            self.modules.add(module)
        return module or ""


# What says how an instance is pickled, and what every class has.
_PICKLED_BY = ("__reduce__", "__reduce_ex__", "__getstate__")
_OF_EVERY_CLASS = {"__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__", "__slotnames__"}


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty"


def _is_own(module: str | None) -> bool:
    """Whether a module is the user's: a script, a notebook, or a file that is not installed."""
    if module == "__main__":
        return True
    file = None if module is None else _file(module)
    return file is not None and not _is_installed(str(module), file) and not _is_standard(file)


def _reached(names: Iterable[str], own: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sources of the user's modules that are reached by imports, and versions of the packages that are.

    Args:
        names: Where to begin.
        own: The verifier's module. Where it is an installed one, the packages that it imports count too.
    """
    sources: dict[str, str] = {}
    versions: dict[str, str] = {}
    waiting, seen = sorted(names), set(names)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if file is None or _is_standard(file):
            continue
        if _is_installed(name, file):
            versions[name.partition(".")[0]] = _version(name.partition(".")[0])
        else:
            sources[name] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        if name in sources or name == own:
            found = _imports_of_file(name, file) - seen
            seen |= found
            waiting += sorted(found)
    return sources, versions


def _imports_of_file(name: str, file: Path) -> set[str]:
    """Modules that a file's import statements name, wherever they stand."""
    if file.suffix != ".py":
        return set()
    found: set[str] = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level and package else relative
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parents = {name.rsplit(".", up)[0] for name in found for up in range(name.count(".") + 1)}
    return {name for name in found | parents if _file(name) is not None}


def _file(name: str) -> Path | None:
    """The file of a module, which is not imported for it; None for what is built in, and for what is no module."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is not None:
        return Path(loaded)
    top, *parts = name.split(".")
    try:
        spec = None if top in sys.modules and not parts else importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not parts:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    places = [Path(folder, *parts) for folder in spec.submodule_search_locations or ()]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def _is_installed(name: str, file: Path) -> bool:
    return name.partition(".")[0] == _PACKAGE or bool({"site-packages", "dist-packages"} & set(file.parts))


def _is_standard(file: Path) -> bool:
    standard = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
    file = file.resolve()
    return not _is_installed("", file) and any(file.is_relative_to(folder) for folder in standard)


def _version(package: str) -> str:
    if package == _PACKAGE:
        return __version__
    return " ".join(sorted(f"{name} {version(name)}" for name in set(_distributions().get(package, ()))))


_distributions = cache(packages_distributions)
