"""The package as a whole: public names, names of modules, and which parts import which."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import composer_sassha

ROOT = Path(composer_sassha.__file__).parent
PLAIN = ("common", "perturbations", "curvature", "optim", "sharpness")  # plain PyTorch


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {module_name(path) for path in ROOT.rglob("__init__.py")}


def ancestors(module: str) -> set[str]:
    """Return the packages that hold a module, and the module itself."""
    parts = module.split(".")
    return {".".join(parts[: k + 1]) for k in range(len(parts))}


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, functions included, without the blocks that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_run_time(child)


def imported(tree: ast.AST) -> set[str]:
    """Return the modules that a module names in its imports, in functions too."""
    found = set()
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            # `from package import name` imports a module if the name is one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & TREES.keys()) or {node.module}
            found |= {node.module} if not names <= TREES.keys() else set()
    return found


def executed(module: str, imports: set[str]) -> set[str]:
    """Return the modules of this package that run when `module` makes its imports.

    That includes the packages that hold them, except those that hold `module`: they run already.
    """
    own = {name for other in imports for name in ancestors(other)} & TREES.keys()
    return own - ancestors(module)


IMPORTS = {module: imported(tree) for module, tree in TREES.items()}
GRAPH = {module: executed(module, imports) for module, imports in IMPORTS.items()}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the nodes of a circle, or nothing if there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := search(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]


def test_no_module_imports_itself_through_others() -> None:
    """Imports within functions count: they put a circle off until the function is called."""
    assert len(GRAPH) > 100 and "composer_sassha.recipes.build" in GRAPH["composer_sassha.recipes.run"]
    assert circle(GRAPH) == []


def test_no_package_imports_itself_through_others() -> None:
    packages: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        parts = {".".join(other.split(".")[:2]) for other in others} - {"composer_sassha"}
        here = ".".join(module.split(".")[:2])
        packages.setdefault(here, set()).update(parts - {here})
    assert "composer_sassha.common" in packages["composer_sassha.optim"]
    assert circle(packages) == []


def test_no_module_has_the_name_of_a_standard_one() -> None:
    """The folder of a file that is run comes first on the path, so such a module hides the standard one."""
    assert [name for name in TREES if name.split(".")[-1] in sys.stdlib_module_names] == []


def bound(tree: ast.Module) -> set[str]:
    """Return the names that the top level of a module gives to anything but a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" not in TREES}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def test_no_package_exports_a_name_over_its_module() -> None:
    """`package.name` would be the module or the function, depending on what was imported last."""
    assert {"composer_sassha.optim", "composer_sassha.recipes"} <= PACKAGES
    hidden = [f"{p}.{name}" for p in PACKAGES for name in bound(TREES[p]) if f"{p}.{name}" in TREES]
    assert hidden == []


def test_the_plain_packages_import_no_composer() -> None:
    """Neither by themselves nor through others; the process sees imports that are made by name, too."""
    names = [f"composer_sassha.{part}" for part in PLAIN]
    left, seen = [module for module in TREES if module.startswith(tuple(f"{n}." for n in names))], set(names)
    while left:
        seen.add(module := left.pop())
        left += GRAPH[module] - seen
    outside = {module: {name.split(".")[0] for name in IMPORTS[module]} for module in seen}
    assert [module for module, others in outside.items() if "composer" in others] == []
    check = "assert not [name for name in sys.modules if name.split('.')[0] == 'composer']"
    subprocess.run([sys.executable, "-c", f"import sys, {', '.join(names)}; {check}"], check=True)


def of_the_world(tree: ast.AST) -> list[str]:
    """Return what a module asks of torch.distributed without saying which ranks are meant."""
    found, aliases = [], ["torch.distributed."]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases += [f"{a.asname}." for a in node.names if a.asname and a.name == "torch.distributed"]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            functions = [
                n for n in names if n.startswith("torch.distributed.") and n.split(".")[-1].islower()
            ]
            found += functions + [name for name in names if name.endswith("common.ranks.world")]
        elif isinstance(node, ast.Attribute):
            found += [text for text in [ast.unparse(node)] if text.endswith(".group.WORLD")]
        elif isinstance(node, ast.Call) and "group" not in {keyword.arg for keyword in node.keywords}:
            name = ast.unparse(node.func)
            found += [name] if name.startswith(tuple(aliases)) and name.split(".")[-1].islower() else []
    return found


def test_reading_the_world_is_found() -> None:
    for line in (
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "torch.distributed.get_rank()",
        "x = dist.group.WORLD",
        "from torch.distributed import get_world_size",
        "from composer_sassha.common.ranks import world",
    ):
        assert of_the_world(ast.parse(line))
    for line in ("dist.all_reduce(x, group=shards)", "from torch.distributed import ProcessGroup"):
        assert not of_the_world(ast.parse(line))


def test_the_plain_packages_do_not_read_the_world() -> None:
    """A process group may be there for other reasons than data parallelism; see `common.ranks`."""
    names = tuple(f"composer_sassha.{part}." for part in PLAIN)
    found = {name: of_the_world(tree) for name, tree in TREES.items() if name.startswith(names)}
    assert found.pop("composer_sassha.common.ranks")
    assert {name: reads for name, reads in found.items() if reads} == {}


@pytest.mark.parametrize("module", ["recipes.errors", "recipes.files", "commands", "commands.command_line"])
def test_what_help_needs_imports_no_torch(module: str) -> None:
    left, seen = [f"composer_sassha.{module}"], set()
    while left:
        seen.add(name := left.pop())
        left += GRAPH[name] - seen
        assert {other.split(".")[0] for other in IMPORTS[name]} <= {
            "composer_sassha",
            *sys.stdlib_module_names,
        }


def test_public_names_are_there_and_unknown_ones_are_not() -> None:
    for name in composer_sassha.__all__:
        assert getattr(composer_sassha, name).__doc__
        assert name in dir(composer_sassha)
    with pytest.raises(AttributeError, match="Sasha"):
        composer_sassha.Sasha  # noqa: B018
