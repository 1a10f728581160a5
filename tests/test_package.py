import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_coverage

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


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Coverage'"):
        _ = hf_coverage.Coverage


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
