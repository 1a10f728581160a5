import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_coverage
from hf_coverage import functional
from tests.processes import run

PACKAGE = Path(hf_coverage.__file__).parent
FLOORS = {
    "functional": 0,
    "inference": 1,
    "plots": 2,
    "ttt": 2,
    "optim": 2,
    "tasks": 2,
    "measure": 3,
    "select": 4,
    "decode": 4,
    "report": 5,
    "commands": 6,
}
FLOORS["__version__"] = -1  # the one thing that the package's front door itself defines for all
TOP = 7  # the command line and the front door


def in_a_new_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import hf_coverage", {"torch", "transformers", "datasets", "matplotlib", "scipy"}),
        ("import hf_coverage.functional", {"torch", "transformers", "datasets", "matplotlib", "scipy"}),
        ("from hf_coverage import CoverageProfile", {"torch", "transformers", "datasets", "matplotlib"}),
    ],
)
def test_importing_is_light(statement, heavy):
    assert in_a_new_interpreter(f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_the_first_plot_imports_matplotlib():
    code = "import sys; from hf_coverage import CoverageProfile as P; P.from_logprobs([-1.0]).plot(); "
    assert in_a_new_interpreter(code + "print('matplotlib' in sys.modules, 'torch' in sys.modules)") == "True False"


@pytest.mark.parametrize("name", hf_coverage.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(hf_coverage, name).__doc__
    assert name in dir(hf_coverage)


@pytest.mark.parametrize("package", [hf_coverage, functional], ids=lambda package: package.__name__)
def test_unknown_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Coverage'"):
        _ = package.Coverage


FUNCTIONAL = sorted(path.stem for path in (PACKAGE / "functional").glob("[!_]*.py"))


def defined(path):
    """Names without underscore that a module's own top level defines."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
        yield from (name for name in names if name and not name.startswith("_"))


@pytest.mark.parametrize("module", FUNCTIONAL)
def test_floor_0_has_every_public_name_of_its_modules(module):
    home = importlib.import_module(f"hf_coverage.functional.{module}")
    assert set(home.__all__) == set(defined(Path(home.__file__)))
    missing = set(home.__all__) - set(dir(functional))
    assert not missing, f"add {sorted(missing)} of {module} to `_HOMES` of functional/__init__.py"
    assert f"    from hf_coverage.functional.{module} import *\n" in Path(functional.__file__).read_text()
    assert all(getattr(functional, name) is getattr(home, name) for name in home.__all__)


def test_a_name_of_floor_0_means_one_thing_in_any_order_of_import(tmp_path):
    assert not set(FUNCTIONAL) & set(functional.__all__)
    script = tmp_path / "script.py"
    start = "import importlib, sys\nfor name in [name for name in sys.modules if name.startswith('hf_coverage')]:\n"
    start += f"    del sys.modules[name]\nimport hf_coverage.functional as f; modules = {FUNCTIONAL}\n"
    names = "found = [getattr(f, name) for name in f.__all__]\n"
    homes = "homes = [importlib.import_module('hf_coverage.functional.' + module) for module in modules]\n"
    same = "print(all(a is b for a, b in zip(found, [getattr(f, name) for name in f.__all__])), len(found))"
    for first, then in ((names, homes), (homes, names)):
        script.write_text(start + first + then + same)
        assert run(script) == f"True {len(functional.__all__)}\n"


def modules():
    # evaluate's modules are scripts that users load, not parts of the house
    return [path for path in PACKAGE.rglob("*.py") if "evaluate_modules" not in path.parts]


def imported(path):
    """What a file imports of the package, as its parts below `hf_coverage`: modules, or names in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_coverage":
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_coverage."):
            yield from ((*node.module.split(".")[1:], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "hf_coverage")


def room(parts):
    return parts[0].removesuffix(".py") if parts else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down_only(path):
    own = room(path.relative_to(PACKAGE).parts)
    for target in imported(path):
        other = room(target)
        if other != own:
            assert FLOORS.get(other, TOP) < FLOORS.get(own, TOP + 1), f"{path.name} of {own} imports {other}"


def test_there_is_no_import_circle():
    """Inside rooms neither, and wherever in a file the import stands."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in modules()}
    paths = {parts[:-1] if parts[-1] == "__init__" else parts: path for parts, path in paths.items()}
    sorter = TopologicalSorter()
    for parts, path in paths.items():
        for target in imported(path):
            # A name is the file's that has it; the package's own front door defines nothing but the version.
            known = next(target[:end] for end in range(len(target), -1, -1) if target[:end] in paths)
            if target != ("__version__",) and known != parts:
                sorter.add("/".join(parts), "/".join(known))
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"these import one another in a circle: {' -> '.join(error.args[1])}")


def test_decode_needs_little_of_measure():
    targets = [target for path in (PACKAGE / "decode").glob("*.py") for target in imported(path)]
    assert len({target for target in targets if room(target) == "measure"}) <= 4


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_user_input_is_never_checked_by_assert(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


FIRST_PARTY = {"hf_coverage", "recipes", "tests"}
DISTRIBUTIONS = {"yaml": "pyyaml"}
WRITTEN_BY_TESTS = {"own-rewards", "only-here"}
OF_AN_EXTRA = {"mathematics.py"}  # modules that are imported where they are used, as what they need is


def distribution(name):
    """How pip calls a module, or what a requirement asks for."""
    name = re.match(r"[\w.-]+", name.split(".")[0])[0].lower()
    return DISTRIBUTIONS.get(name, re.sub(r"[-_.]+", "-", name))


def third_party(path):
    """What a file imports of other projects, and whether it does so whenever it is imported itself."""
    tree = ast.parse(path.read_text())
    tops = [] if path.name in OF_AN_EXTRA else tree.body
    always = {id(node) for top in tops if isinstance(top, (ast.Import, ast.ImportFrom)) for node in ast.walk(top)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "importorskip"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in names:
            if name.split(".")[0] not in FIRST_PARTY | sys.stdlib_module_names:
                yield distribution(name), id(node) in always


@pytest.fixture(scope="module")
def declared():
    project = pytest.importorskip("tomllib").loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"] | {"": project["dependencies"]}
    return {extra: {distribution(text) for text in texts} for extra, texts in extras.items()}


def test_the_package_imports_what_it_declares_and_nothing_else(declared):
    imports = {found for path in PACKAGE.rglob("*.py") for found in third_party(path)}
    always = {name for name, is_always in imports if is_always}
    assert not always - declared[""], "declare in `dependencies` of pyproject.toml"
    assert not {name for name, _ in imports} - set().union(*declared.values()), "declare in an extra of pyproject.toml"
    assert not declared[""] - {name for name, _ in imports}, "nothing imports what is declared"


@pytest.mark.parametrize(
    ("folder", "extras"), [("recipes", ["", "recipes"]), ("tests", ["", "math", "quantization", "recipes", "test"])]
)
def test_recipes_and_tests_import_what_is_declared(declared, folder, extras):
    paths = sorted((PACKAGE.parent / folder).rglob("*.py"))
    siblings = {
        distribution(path.stem) for top in ("recipes", "tests") for path in (PACKAGE.parent / top).rglob("*.py")
    }
    allowed = set().union(*(declared[extra] for extra in extras)) | siblings | WRITTEN_BY_TESTS
    missing = {name: path for path in paths for name, _ in third_party(path) if name not in allowed}
    assert not missing, f"declare in pyproject.toml: {missing}"


MAP = (PACKAGE / "README.md").read_text()
LINE = re.compile(r"^- `([^`]+)`: (.+?)(?: Used by `([^`]+)` alone: (.+))?$", re.MULTILINE)
ROOMS = [*(name for name in FLOORS if not name.startswith("_")), "cli"]


def files():
    return [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".j2", ".js")]


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def importers():
    """The modules of the package that each of its modules is imported by; front doors hand out what they import."""
    known = {relative(path).removesuffix(".py"): relative(path) for path in modules()}
    found, handed_out = {path: set() for path in known.values()}, set()
    for path in modules():
        for target in imported(path):
            # the last part is a module, or a name in one
            for parts in (target, target[:-1]):
                if "/".join(parts) in known:
                    found[known["/".join(parts)]].add(relative(path))
                    break
    for door in ("__init__.py", "functional/__init__.py", "cli.py", "__main__.py"):
        handed_out |= {path for path, by in found.items() if door in by}
    return {path: by for path, by in found.items() if path not in handed_out and not path.endswith("__init__.py")}


def test_every_file_has_its_line_in_the_map_and_every_line_its_file():
    lines = {match[1]: match[2] for match in LINE.finditer(MAP)}
    there = {relative(path): path for path in files()}
    assert not lines.keys() - there.keys(), "take these lines out of hf_coverage/README.md"
    docstrings = {
        name: " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
        for name, path in there.items()
        if path.suffix == ".py"
    }
    wanted = {name: docstrings.get(name, lines.get(name, "what it is")) for name in there}
    missing = [f"- `{name}`: {text}" for name, text in sorted(wanted.items()) if lines.get(name) != text]
    assert not missing, "put into hf_coverage/README.md:\n" + "\n".join(missing)


def test_the_map_goes_by_room_from_the_ground_up():
    titles = [title.removesuffix("/").removesuffix(".py") for title in re.findall(r"^## `(.+)`$", MAP, re.MULTILINE)]
    assert [title for title in titles if title in ROOMS] == ROOMS
    for section in MAP.split("\n## ")[1:]:
        names = [match[1] for match in LINE.finditer(section)]
        assert names == sorted(names)
        assert {name.split("/")[0] for name in names} == {section.split("`")[1].removesuffix("/")}


def test_a_module_with_one_importer_says_why():
    reasons = {match[1]: match[3] for match in LINE.finditer(MAP) if match[3]}
    alone = {path: next(iter(by)) for path, by in importers().items() if len(by) == 1}
    assert reasons == alone, "say in hf_coverage/README.md: `Used by `<file>` alone: <why>`, or bring the module home"
