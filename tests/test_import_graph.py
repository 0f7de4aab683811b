"""Imports flow one way, and importing the package needs nothing that it may do without."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dcft_kernels

PACKAGE = Path(dcft_kernels.__file__).parent

# From the bottom up: a module may import from layers below its own, and from its own package.
LAYERS: list[set[str]] = [
    {"adapter", "adapter_folder", "autocast", "wrappers"},
    {"dropout", "rounding", "validation"},
    {"initialization", "nonlinearity"},
    {"reference", "torch_backend", "triton"},
    {"backends"},
    {"autograd"},
    {"functional"},
    {"linear"},
    {"targets", "explanation", "peft_layers", "trained_state"},
    {"model"},
    {"adapter_files", "constraints"},
    {"recipes"},
    {"", "peft"},
]
# Inside the subpackages, the flow goes on.
SUBPACKAGES: dict[str, list[set[str]]] = {
    "triton": [
        {"__init__", "philox", "tiles", "windows"},
        {"launch"},
        {"partials"},
        {"expand", "gemm", "row_block", "shrink"},
        {"seeded"},
        {"passes"},
    ],
    "peft": [
        {"config"},
        {"layer"},
        {"checkpoint", "combination"},
        {"model"},
        {"saved"},
        {"conversion", "export", "hotswap"},
        {"__init__"},
    ],
}


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The top-level module or subpackage that a file belongs to; "" is the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_units(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcft_kernels"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("dcft_kernels.")
            }
    return names


def level_of(name: str, layers: list[set[str]] = LAYERS) -> int:
    return next(level for level, names in enumerate(layers) if name in names)


def test_every_file_has_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {unit(path) for path in source_files()} <= known


def test_imports_flow_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in source_files()
        for name in imported_units(ast.parse(path.read_text(encoding="utf-8")))
        if name != unit(path) and level_of(name) >= level_of(unit(path))
    ]
    assert wrong == []


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_a_subpackages_imports_flow_one_way(subpackage: str) -> None:
    layers = SUBPACKAGES[subpackage]
    for path in (PACKAGE / subpackage).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith(f"dcft_kernels.{subpackage}"):
                parts = module.split(".")[2:]
                for name in parts or [alias.name for alias in node.names]:
                    above = level_of(path.stem, layers)
                    assert level_of(name, layers) < above, f"{path.name} imports {name}"


def test_the_oracle_and_the_kernels_load_only_on_demand() -> None:
    for path in source_files():
        top_level = ast.Module(ast.parse(path.read_text(encoding="utf-8")).body, [])
        for function in [n for n in ast.walk(top_level) if isinstance(n, ast.FunctionDef)]:
            function.body = []
        for name in imported_units(top_level) & {"reference", "triton"}:
            assert unit(path) == name, f"{path.name} imports {name} when it is loaded"


def test_no_catch_all_modules() -> None:
    assert not [p for p in source_files() if p.stem in ("utils", "common", "helpers", "misc")]


def test_the_face_has_no_code() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds <= {ast.ImportFrom, ast.Assign}
    assert dcft_kernels.__all__ == sorted(dcft_kernels.__all__)
    imported = {
        alias.asname or alias.name
        for n in tree.body
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    assert set(dcft_kernels.__all__) == imported


def test_import_needs_no_optional_package() -> None:
    """With every optional package hidden, the package imports and a layer runs."""
    script = """
import sys
for name in ("triton", "peft", "transformers", "accelerate", "matplotlib", "rich"):
    sys.modules[name] = None
import torch, dcft_kernels
lazy = ("dcft_kernels.reference", "dcft_kernels.triton")
assert not [m for m in sys.modules if m.startswith(lazy)]
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
dcft_kernels.swap_linear(model)
model(torch.randn(2, 16)).sum().backward()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
