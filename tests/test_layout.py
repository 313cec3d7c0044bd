"""Imports go one way, heavy frameworks are never needed, and no module costs more than its users want."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

import fot_jax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fot_jax"

# A module may import modules of earlier lines only.
ORDER = [
    {"config", "files", "hardware", "hlo", "host", "sources", "watching"},
    {"mirror", "processes", "sharding", "staging", "tokenizer"},
    {"data", "attention", "checkpoint"},
    {"exports", "formats", "memory", "crossbatch"},
    {"pretrained"},
    {"model", "metrics"},
    {"losses", "run_config"},
    {"generate", "programs"},
    {"training"},
    {"evals", "forecast"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# What data may import of the project: it runs in loader processes, which need no model.
DATA_MAY_IMPORT = {"files", "tokenizer", "sources", "data"}
HEAVY = {"torch", "tensorflow", "transformers"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
COMMANDS = [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("convert/*.py")]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that a piece of code imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of_the_project(path: pathlib.Path) -> set[str]:
    """Names of the modules and packages directly under fot_jax that a file imports."""
    names = imported(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[1] for name in names if name.startswith("fot_jax.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} has no place in the order"
    for other in sorted(parts_of_the_project(path) - {part}):
        assert LEVEL[other] < LEVEL[part], f"{part} imports {other}"


def test_data_needs_no_model():
    for part in DATA_MAY_IMPORT:
        assert parts_of_the_project(PACKAGE / f"{part}.py") <= DATA_MAY_IMPORT


def top_level_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements run when a module is imported: all but bodies of functions."""
    out = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        inner = [statement for block in blocks for statement in block]
        out += top_level_statements(inner) if inner else [node]
    return out


@pytest.mark.parametrize("path", [*MODULES, *COMMANDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_framework_is_needed_to_import(path):
    for node in top_level_statements(ast.parse(path.read_text(encoding="utf-8")).body):
        roots = {name.split(".")[0] for name in imported(node)}
        assert not roots & HEAVY, f"{path.name}:{node.lineno}"


def test_only_the_checkpoint_module_uses_orbax():
    for path in [*MODULES, *COMMANDS]:
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        assert "orbax" not in roots or path == PACKAGE / "checkpoint.py", path


def test_importing_the_package_is_cheap_and_names_resolve_in_any_order():
    code = """
import sys
import fot_jax
assert not {"jax", "flax", "orbax", "tensorflow_datasets", "torch"} & set(sys.modules), "import fot_jax loads too much"
import fot_jax.generate
assert callable(fot_jax.generate), "the module hides the function"
from fot_jax.generate import long_forward
assert fot_jax.long_forward is long_forward
assert fot_jax.crossbatch.published_plan and fot_jax.memory.topk_attention
assert not {"tensorflow_datasets", "tensorflow", "torch"} & set(sys.modules), "inference loads the data modules"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_exist():
    for name in fot_jax.__all__:
        assert getattr(fot_jax, name) is not None
    assert set(fot_jax.__all__) <= set(dir(fot_jax))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        fot_jax.nonsense  # noqa: B018
