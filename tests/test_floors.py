"""The layout of the house: imports go strictly downward, rooms have no cycles, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flexrun

PACKAGE = Path(flexrun.__file__).parent
FLOORS = {
    "cli": 6,
    "jobs": 5,
    "evals": 5,
    "llm": 4,
    "policy": 3,
    "offload": 3,
    "report": 3,
    "weights": 2,
    "moe": 2,
    "placement": 2,
    "hardware": 2,
    "models": 1,
    "attention": 1,
    "compress": 1,
    "tokenizer": 1,
    "config": 1,
    "sampling": 1,
    "outputs": 1,
    "workload": 1,
    "schedule": 0,
    "streaming": 0,
    "attention_steps": 0,
    "steps": 0,
    "native": 0,
    "machine": 0,
    "openmp": 0,
    "disk_io": 0,
    "gguf_header": 0,
    "prefixes": 0,
    "core": 0,
    "errors": 0,
}
GROUND_ORDER = {  # inside floor 0
    "errors": 0,
    "core": 1,
    "steps": 2,
    "streaming": 3,
    "attention_steps": 3,
    "schedule": 4,
    "native": 2,
    "machine": 2,
    "openmp": 2,
    "disk_io": 2,
    "gguf_header": 2,
    "prefixes": 2,
}
FACES = {"__init__", "__main__"}  # flexrun/__init__.py shows LLM and its company; __main__ calls cli
LINES = 400

MODULES = {
    ".".join(("flexrun", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def resolve(module: str) -> str | None:
    """The module of the package that a dotted name lies in: itself, or where an imported name is defined."""
    while module and module not in MODULES:
        module = module.rpartition(".")[0]
    return module or None


def imports_of(module: str) -> list[tuple[str, ast.stmt, bool]]:
    """(imported dotted name, statement, whether a function holds it), for every import but those for type checkers."""
    tree = ast.parse(MODULES[module].read_text())
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found.extend((f"{base}.{alias.name}", node, lazy) for alias in node.names)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def flexrun_imports(module: str) -> list[tuple[str, ast.stmt, bool]]:
    return [
        (resolve(name), statement, lazy)
        for name, statement, lazy in imports_of(module)
        if name.partition(".")[0] == "flexrun" and name != "flexrun.__version__"
    ]


def test_every_module_is_on_the_map():
    rooms = {room_of(module) for module in MODULES} - FACES
    assert rooms <= set(FLOORS), f"not on any floor: {sorted(rooms - set(FLOORS))}"
    assert set(GROUND_ORDER) == {room for room, floor in FLOORS.items() if floor == 0}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module):
    room = room_of(module)
    for target, statement, _ in flexrun_imports(module):
        there = room_of(target)
        where = f"{MODULES[module].relative_to(PACKAGE.parent)}:{statement.lineno} imports {target}"
        if target == "flexrun":
            assert room in ("cli", "__main__"), f"{where}: go to the room itself"
            continue
        if room in FACES or there == room:
            continue
        if FLOORS[room] == FLOORS[there] == 0:
            assert GROUND_ORDER[there] < GROUND_ORDER[room], f"{where}: sideways or up on the ground floor"
        else:
            assert FLOORS[there] < FLOORS[room], f"{where}: floor {FLOORS[there]} from floor {FLOORS[room]}"


@pytest.mark.parametrize("module", MODULES)
def test_no_transformers_and_no_late_imports_of_our_own(module):
    for name, statement, _ in imports_of(module):
        where = f"{MODULES[module].relative_to(PACKAGE.parent)}:{statement.lineno}"
        assert name.partition(".")[0] != "transformers", f"{where} imports transformers, which is a test oracle only"
    if room_of(module) in ("cli", *FACES):
        return
    for target, statement, lazy in flexrun_imports(module):
        assert not lazy, f"{MODULES[module].relative_to(PACKAGE.parent)}:{statement.lineno} imports {target} late"


def test_no_room_imports_in_a_circle():
    edges: dict[str, set[str]] = {
        module: {
            target
            for target, _, _ in flexrun_imports(module)
            if target != module and room_of(target) == room_of(module)
        }
        for module in MODULES
        if room_of(module) not in FACES
    }
    finished: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for target in sorted(edges.get(module, ())):
                walk(target, (*path, module))
            finished.add(module)

    for module in edges:
        walk(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small_and_say_why_they_exist(module):
    text = MODULES[module].read_text()
    assert text.count("\n") < LINES
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
