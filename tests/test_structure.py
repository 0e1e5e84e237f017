"""The house: imports go one way, functions tell one story, the Hub folder's files can be read at a sitting."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

from modeling_blip_rbm.configuration_blip_rbm import HUB_FILES
from tests.conftest import REPO


# From the ground up: a package imports from those before it alone.
FLOORS = ("modeling_blip_rbm", "boltzmann", "training.lib", "training", "experiments", "benchmarks", "examples")
# The same inside the model's package.
ROOMS = (
    "rbm",
    "configuration",
    "phrases",
    "vision",
    "inference",
    "static",
    "processors",
    "generation",
    "modeling",
    "processing",
    "pipeline",
)
FILES = [file for floor in FLOORS if "." not in floor for file in sorted((REPO / floor).rglob("*.py"))]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int:
    return max(
        (i for i, floor in enumerate(FLOORS) if f"{module}.".startswith(f"{floor}.")),
        key=lambda i: len(FLOORS[i]),
        default=-1,
    )


def imports_of(file: Path) -> set[str]:
    """Modules of ours that a file imports when it is imported itself."""
    module, names = module_of(file), set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [parent, node.module or ""]))
            names |= {
                f"{source}.{alias.name}" if (REPO / source.replace(".", "/") / f"{alias.name}.py").exists() else source
                for alias in node.names
            }
    return {name for name in names if floor_of(name) >= 0}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_down(file):
    floor = floor_of(module_of(file))
    for name in imports_of(file):
        assert floor_of(name) <= floor, f"{module_of(file)} imports {name}"
        if FLOORS[floor] == "training":  # a stage is no library: what two of them share is in training/lib
            assert floor_of(name) < floor or file.name == "__init__.py", f"the stage {module_of(file)} imports {name}"


def test_rooms_of_the_model_go_down():
    files = {file.stem.removesuffix("_blip_rbm"): file for file in (REPO / "modeling_blip_rbm").glob("*.py")}
    assert {f"{room}_blip_rbm.py" if room != "rbm" else "rbm.py" for room in ROOMS} == set(HUB_FILES)
    for room, file in files.items():
        if room in ROOMS:
            imported = {name.rpartition(".")[2].removesuffix("_blip_rbm") for name in imports_of(file)}
            assert imported <= set(ROOMS[: ROOMS.index(room)]), (room, imported)


def test_there_is_no_circle():
    edges = {module_of(file): imports_of(file) for file in FILES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for name in edges.get(module, ()):
                visit(name)
            done.add(path.pop())

    for module in edges:
        visit(module)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_functions_tell_one_story(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("name", HUB_FILES)
def test_files_of_the_hub_folder_can_be_read_at_a_sitting(name):
    assert len((REPO / "modeling_blip_rbm" / name).read_text().splitlines()) <= 600


def test_floors_are_written_from_the_ground_up():
    """`training.lib` is inside `training`, and below it."""
    assert [b for a, b in pairwise(FLOORS) if b.startswith(a.split(".")[0] + ".") or a.startswith(b + ".")] == [
        "training"
    ]
    assert floor_of("training.lib.pairs") == FLOORS.index("training.lib") and floor_of(
        "training.align"
    ) == FLOORS.index("training")
