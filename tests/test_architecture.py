"""The architecture: which room may import which, what starts without torch, and that names are unique.

docs/architecture.md draws ``FLOORS``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("drrho_clip", "training")
    for path in sorted((SRC / package).rglob("*.py"))
}
# From the ground up. A room is a folder, or a module of the hall; it imports from lower floors and from itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("drrho_clip",),
    (
        "training.config",
        "training.files",
        "training.rng",
        "training.numerics",
        "training.machine",
        "training.metric_names",
    ),
    ("training.distributed",),
    ("training.data", "training.checkpoint", "training.predictions"),
    ("training.models", "training.reports"),
    ("training.logger",),
    ("training.loop", "training.evaluation", "training.cache", "training.exporting", "training.run_report"),
    ("training.preflight",),
    ("training.run", "training.dry_run"),
    (
        "training.main",
        "training.check_data",
        "training.check_cache",
        "training.check_reference",
        "training.export",
        "training.evaluate",
        "training.download_evalsets",
        "training.report",
    ),
)
# The same inside the method: modules of one row do not import each other, except the losses.
METHOD: tuple[tuple[str, ...], ...] = (
    ("batch", "codec", "collectives", "float32", "normalize", "schedules", "worst_case", "losses.registry",
     "state.fixed_point", "state.readback"),
    ("sample_state",),
    ("state.host_state",),
    ("losses.interface", "losses.gather", "losses.pair_kernels", "losses.compositional", "losses.baselines",
     "losses.distillation", "losses.fastclip", "losses.individual"),
    ("reference", "selection", "risk"),
)  # fmt: skip
WITHOUT_TORCH = (
    "training.config",
    "training.machine",
    "training.check_data",
    "training.check_reference",
    "training.report",
    "training.distributed.launcher",
    "drrho_clip.state.fixed_point",
    "drrho_clip.losses.registry",
)
MAY_COMMUNICATE = {
    "drrho_clip.collectives",
    "training.distributed.collectives",
    "training.distributed.ddp",
    "training.distributed.devices",
    "training.distributed.powersgd",
    "training.distributed.process_group",
    "training.distributed.rendezvous",
    "training.checkpoint.sample_state_io",
}
# Outside these modules, torch.distributed may be imported only for its types.
MAY_USE_TYPES = {
    "drrho_clip.sample_state": {"torch.distributed.device_mesh", "torch.distributed.tensor"},
}
MOST_ENTRIES = 14


def imports_of(module: str) -> set[str]:
    """Every module that ``module`` imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of this project that ``module`` imports, without packages, whose ``__init__`` holds no code."""
    return {name for name in imports_of(module) if name in MODULES and not is_package(name)} - {module}


def is_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def room_of(module: str) -> tuple[int, str]:
    """Floor and name of the room that ``module`` stands in."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return floor, room
    raise AssertionError(f"{module} is not in FLOORS: put it into a room, or add one")


def against_the_floors(module: str, imported: str) -> str | None:
    """What is wrong with this import; None: nothing."""
    (floor, room), (other_floor, other) = room_of(module), room_of(imported)
    if room == other or other_floor < floor:
        return None
    if other_floor == floor:
        return (
            f"{module} imports {imported}: {room} and {other} are on one floor and may not import each other; "
            "let the hall (training.run) pass what one needs from the other"
        )
    return (
        f"{module} imports {imported}: {other} stands above {room}, and imports go down only; move what is needed "
        "to a lower room, or hand it in"
    )


def test_there_is_something_to_check():
    assert len([m for m in MODULES if not is_package(m)]) > 60
    assert "drrho_clip.sample_state" in ours("drrho_clip.losses.interface")


@pytest.mark.parametrize("module", [m for m in MODULES if not is_package(m)])
def test_imports_go_down(module):
    faults = [fault for imported in ours(module) if (fault := against_the_floors(module, imported))]
    assert not faults, "\n".join(faults)


def test_an_import_against_the_floors_is_named_with_its_rule():
    up = against_the_floors("training.data.loader", "training.cache.features")
    assert up is not None and "training.cache stands above training.data, and imports go down only" in up
    across = against_the_floors("training.loop.trainer", "training.evaluation.evaluate")
    assert across is not None and "on one floor and may not import each other" in across
    assert against_the_floors("training.loop.trainer", "training.data.loader") is None


def test_rooms_of_the_method_are_in_order():
    level = {f"drrho_clip.{name}": i for i, row in enumerate(METHOD) for name in row}
    for module in MODULES:
        if module.startswith("drrho_clip") and not is_package(module):
            assert module in level, f"{module} is not in METHOD"
            for imported in runtime_imports(module):
                assert level[imported] <= level[module], f"{module} imports {imported}, which stands above it"


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"imports in a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in runtime_imports(module):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def runtime_imports(module: str) -> set[str]:
    """``ours`` without what is imported for type checkers alone."""
    tree = ast.parse(MODULES[module].read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in MODULES and not is_package(name)} - {module}


@pytest.mark.parametrize("package", sorted(m for m in MODULES if is_package(m)))
def test_packages_hold_a_docstring_and_nothing_else(package):
    """So that importing a module of a room imports no other one."""
    tree = ast.parse(MODULES[package].read_text())
    assert ast.get_docstring(tree), f"{package} has no docstring"
    assert len(tree.body) == 1, f"{package} holds code: an __init__ is a docstring, and re-exports nothing"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda f: f.name)
def test_no_room_has_too_many_entries(folder):
    entries = [p.name for p in folder.iterdir() if p.name not in ("__init__.py", "__pycache__", "py.typed")]
    hall = folder == SRC / "training"
    assert hall or len(entries) <= MOST_ENTRIES, f"{folder} has {len(entries)} entries: make a room of some"


def test_each_class_has_a_name_of_its_own():
    places = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not twice, f"classes of one name: {twice}"


def test_refusals_come_without_torch():
    """In a new process, because this one has imported torch."""
    modules = [m for m in MODULES if any(m == room or m.startswith(f"{room}.") for room in WITHOUT_TORCH)]
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}
    )
    assert done.stdout == "False\n", f"one of {WITHOUT_TORCH} imports torch at its start: {done.stderr}"


@pytest.mark.parametrize("module", sorted(m for m in set(MODULES) - MAY_COMMUNICATE if not is_package(m)))
def test_collectives_stay_in_their_rooms(module):
    allowed = MAY_USE_TYPES.get(module, set())
    named = {name for name in imports_of(module) if name.startswith("torch.distributed")}
    assert all(any(name.startswith(a) for a in allowed) for name in named), (
        f"{module} names {named}: ranks communicate only through {sorted(MAY_COMMUNICATE)}"
    )
    source = MODULES[module].read_text()
    assert "torch.distributed." not in "\n".join(
        line for line in _code_lines(source) if not line.lstrip().startswith(("from ", "import "))
    )


def _code_lines(source: str) -> list[str]:
    """The lines of code, without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).splitlines()


def test_only_builders_unpack_the_configuration_for_the_loop():
    """The step, the task and the loop take plain values, so they work under another command line too."""
    for module in ("training.loop.step", "training.loop.task", "training.loop.trainer"):
        assert not {name for name in imports_of(module) if name.startswith("training.config")}
