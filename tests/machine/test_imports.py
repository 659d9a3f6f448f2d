# SPDX-License-Identifier: Apache-2.0
"""The modules of the package import each other one way: there is no circle.

An import counts wherever it stands, inside a function too, unless it is for type checkers alone. A
name that a package hands on is imported from the module that defines it: `from fastattn import
attention` counts as `fastattn._attention`, for a package's __init__ is how others see the package.
"""

import ast
import graphlib
from pathlib import Path

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent


def sources_of(package):
    """Return the syntax tree of each module of a package, by its name.

    What a stub stands for is compiled, and imports none of them.
    """
    trees = {}
    for path in (*package.rglob("*.py"), *package.rglob("*.pyi")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8") if path.suffix == ".py" else "")
    return trees


def at_run_time(node):
    """Yield a tree's imports and dotted names, but for those under `if TYPE_CHECKING`."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Name) or dotted(node):
        yield node
        return
    checkers_alone = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if checkers_alone else ast.iter_child_nodes(node):
        yield from at_run_time(child)


def dotted(node):
    """Tell whether a node is a name with attributes alone, as `fastattn.torch.attention` is."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def bindings_of(tree):
    """Return what the imported names of a module stand for, as dotted names."""
    found = {}
    for node in at_run_time(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package has no relative imports"
            found |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
        elif isinstance(node, ast.Import):
            found |= {x.asname or x.name.split(".")[0]: x.asname and x.name for x in node.names}
    return {name: meant or name for name, meant in found.items()}


def module_of(name, bound):
    """Return the module that defines a dotted name, or is it; None if it is another's."""
    module, *rest = name.split(".")
    while rest and f"{module}.{rest[0]}" in bound:
        module, *rest = f"{module}.{rest[0]}", *rest[1:]
    if module not in bound:
        return None
    handed_on = bound[module].get(rest[0]) if rest else None
    return (handed_on and module_of(".".join([handed_on, *rest[1:]]), bound)) or module


def graph_of(trees):
    """Return the modules that each module imports: those of the names that it uses or hands on."""
    bound = {module: bindings_of(tree) for module, tree in trees.items()}
    graph = {module: set() for module in trees}
    for module, tree in trees.items():
        names = {ast.unparse(x) for x in at_run_time(tree) if dotted(x)} | bound[module].keys()
        for name in names:
            if any(x.startswith(name + ".") for x in names):
                continue  # of this module only something is used
            first, dot, rest = name.partition(".")
            if first in bound[module]:
                graph[module].add(module_of(bound[module][first] + dot + rest, bound))
        graph[module] -= {module, None}
    return graph


def circle_in(package):
    """Return a circle of imports, each module importing the next, or None."""
    try:
        graphlib.TopologicalSorter(graph_of(sources_of(package))).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return None


def test_no_circle():
    assert circle_in(PACKAGE) is None


@pytest.mark.parametrize(
    ("first", "second", "circle"),
    [
        ("from pkg.b import f", "from pkg.a import g", True),
        ("import pkg.b\npkg.b.f()", "def f():\n    from pkg import g", True),
        ("from pkg import f", "import pkg as p\np.g()", True),
        ("from pkg import f", "if TYPE_CHECKING:\n    from pkg import g", False),
        ("import pkg\npkg.f()", "def f(): ...", False),
    ],
)
def test_a_circle_is_found(first, second, circle, tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from pkg.a import g\nfrom pkg.b import f\n")
    (package / "a.py").write_text(first)
    (package / "b.py").write_text(second)
    assert sorted(set(circle_in(package) or ())) == (["pkg.a", "pkg.b"] if circle else [])
