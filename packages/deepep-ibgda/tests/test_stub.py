"""The stub file says what the extension has: the Python side is checked against it, by mypy and by tests."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import deepep_ibgda

STUB = Path(deepep_ibgda.__file__).with_name("_ibgda.pyi")


def declared() -> dict[str, tuple[str, ...]]:
    """Argument names of every function and method of the stub, by dotted name."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(STUB.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if not isinstance(member, ast.FunctionDef):
                continue
            if not any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list):
                names = [a.arg for a in (*member.args.args, *member.args.kwonlyargs) if a.arg != "self"]
                found[prefix + member.name] = tuple(names)
    return found


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    try:
        return importlib.import_module("deepep_ibgda._ibgda")
    except ImportError as error:
        pytest.skip(f"needs the native extension of deepep-ibgda: {error}")


def arguments_of(function: Any) -> tuple[str, ...]:
    """Argument names from the signature that pybind11 puts into the docstring."""
    signature = re.search(r"\((.*)\) ->", (function.__doc__ or "").splitlines()[0])
    assert signature is not None, f"no signature in {function.__doc__!r}"
    parts = re.split(r",\s*(?![^\[\]]*\])", signature.group(1)) if signature.group(1) else []
    return tuple(part.split(":")[0].strip() for part in parts if part.split(":")[0].strip() not in ("self", "*", ""))


def test_stub_declares_functions() -> None:
    names = declared()
    assert {"Runtime.__init__", "Runtime.dispatch", "Runtime.combine", "capture_id"} <= set(names)
    assert names["capture_id"] == ("stream",) and "handle" in names["Runtime.combine"]


@pytest.mark.parametrize("name", [name for name in declared() if "nvshmem" not in name.lower()])
def test_extension_takes_the_arguments_of_its_stub(extension: ModuleType, name: str) -> None:
    found: Any = extension
    for part in name.split("."):
        found = getattr(found, part)
    assert arguments_of(found) == declared()[name]
