"""Imports go downwards only, as docs/design.md says."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "resnet_bk"
LAYERS = [
    ["errors", "files", "hub", "environment", "schema", "chance", "heap", "atomics", "crew", "threads", "imagined"],
    ["frugal"],
    ["ops"],
    ["layers"],
    ["models"],
    ["memory"],
    ["training"],
    ["planner"],
    ["bench"],
    ["report"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
REPORT_MAY_IMPORT = {"errors", "files", "schema", "chance", "report"}


def imports_of(path):
    """(importing room, imported room, line) for each import of our own inside a file."""
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "resnet_bk" and len(parts) > 1:
                yield room, parts[1], node.lineno


def files():
    return [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name in ("errors.py", "files.py")]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_import_points_upwards(path):
    for room, imported, line in imports_of(path):
        assert RANK[imported] <= RANK[room], f"{path}:{line} imports {imported} from {room}"


def test_the_report_knows_nothing_but_its_json():
    imported = {name for path in (SOURCE / "report").rglob("*.py") for _, name, _ in imports_of(path)}
    assert imported <= REPORT_MAY_IMPORT


def test_nothing_is_ever_unpickled():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in ("pickle", "cloudpickle", "joblib", "allow_pickle"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                raise AssertionError(f"{path}:{node.lineno} loads a pickle")
