"""Imports go one way, and only a few modules may speak to other ranks."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("drrho_clip", "training")
    for path in sorted((SRC / package).rglob("*.py"))
}
MAY_COMMUNICATE = {
    "drrho_clip.collectives",
    "training.distributed.process_group",
    "training.checkpoint.sample_state_io",
}
# Outside these, torch.distributed may be named for its types alone.
MAY_USE_TYPES = {
    "drrho_clip.sample_state": {"torch.distributed.tensor"},
    "training.loop.step": {"torch.nn.parallel"},
}
# Lower rooms first; a module may import from its own row and from those before it.
ROOMS = [
    {"drrho_clip", "drrho_clip.batch", "drrho_clip.collectives", "drrho_clip.float32", "drrho_clip.normalize"},
    {"drrho_clip.schedules"},
    {"drrho_clip.sample_state"},
    {m for m in MODULES if m.startswith("drrho_clip.losses")},
    {"drrho_clip.reference", "drrho_clip.selection"},
]


def imports_of(module: str) -> set[str]:
    """Every module of ours, or torch.distributed one, that ``module`` names, at any depth of its code."""
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
    return {name for name in imports_of(module) if name in MODULES and name != module}


def test_there_is_something_to_check():
    assert len(MODULES) > 20
    assert "drrho_clip.sample_state" in ours("drrho_clip.losses.fastclip")


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            # Importing a package's name runs its __init__, which imports its modules: that is no cycle.
            for other in ours(module):
                if not other.startswith(f"{module}.") and not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("drrho_clip")])
def test_the_method_knows_nothing_of_the_trainer(module):
    assert not {name for name in imports_of(module) if name.split(".")[0] == "training"}


def test_rooms_of_the_method_are_in_order():
    level = {module: i for i, room in enumerate(ROOMS) for module in room}
    for module in MODULES:
        if module.startswith("drrho_clip"):
            assert module in level, f"{module} has no place in ROOMS"
            assert all(level[other] <= level[module] for other in ours(module)), module


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_COMMUNICATE))
def test_collectives_stay_in_their_rooms(module):
    allowed = MAY_USE_TYPES.get(module, set())
    named = {name for name in imports_of(module) if name.startswith("torch.distributed")}
    assert all(any(name.startswith(a) for a in allowed) for name in named), named
    source = MODULES[module].read_text()
    assert "torch.distributed." not in "\n".join(
        line for line in _code_lines(source) if not line.lstrip().startswith(("from ", "import "))
    )


def _code_lines(source: str) -> list[str]:
    """Lines without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).splitlines()


def test_only_main_unpacks_the_configuration_for_the_loop():
    """The step, the task and the loop take plain values; they would work under another command line."""
    for module in ("training.loop.step", "training.loop.task", "training.loop.trainer"):
        assert "training.config.params" not in imports_of(module)
