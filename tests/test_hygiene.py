"""What importing kp brings in, which folder may import what, and that the package holds every folder."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kp_compiler": "kp_compiler", "passes": "kp_compiler.passes", "lowering": "kp_compiler.lowering"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
UNWANTED = {"transformer_engine", "flash_attn", "cutlass", "transformers", "passes", "lowering"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
KERNELS = ("aten", "flex", "fa4", "block_mask", "reference", "inductor", "dense_mask")


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light(tmp_path: Path) -> None:
    """No Triton, no optional package beyond what importing torch brings, no module under two names."""
    code = (
        "import sys, torch; before = set(sys.modules); import kp_compiler; new = set(sys.modules) - before\n"
        "roots = {name.split('.')[0] for name in new}\n"
        f"print(sorted(roots & {UNWANTED | {'triton'}}))"
    )
    assert run_python(code, tmp_path) == "[]"
    assert run_python(code, ROOT) == "[]"


def test_compiling_needs_no_kernel_library(tmp_path: Path) -> None:
    code = (
        "import sys, torch; import torch.nn.functional as F\n"
        "x = torch.randn(1, 2, 8, 16)\n"
        "f = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend='kp',"
        " options={'cpu_rewrites': True, 'lowering': 'aot_eager', 'strict': True})\n"
        "f(x)\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        f"print(sorted(roots & {UNWANTED}))"
    )
    assert run_python(code, tmp_path) == "[]"


def test_backend_is_known_without_an_import(tmp_path: Path) -> None:
    code = "import sys, torch; print('kp' in torch._dynamo.list_backends(), 'kp_compiler' in sys.modules)"
    assert run_python(code, tmp_path) == "True False"


def test_no_generic_name_is_importable(tmp_path: Path) -> None:
    """Outside the repository there is no top-level `passes` or `lowering`."""
    code = "import importlib.util as u; print(u.find_spec('passes'), u.find_spec('lowering'))"
    assert run_python(code, tmp_path) == "None None"


def test_package_list_is_complete() -> None:
    """Packages are listed one by one: a folder that is missing would be missing from wheels, silently."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {
        ".".join((FOLDERS[folder], *path.parent.relative_to(ROOT / folder).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(listed) == found
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


# ----------------------------------------------------------------------------------------------- import rules


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_import_direction(path: Path) -> None:
    """Passes know no kernel, kernels know no pass; kernel libraries are imported inside functions only."""
    tree = ast.parse(path.read_text())
    names = list(imports(tree))
    folder = path.relative_to(ROOT).parts[0]
    assert not [name for name in names if under(name, "passes", "lowering")]
    if folder == "passes":
        assert not [n for n in names if under(n, *(f"kp_compiler.lowering.{kernel}" for kernel in KERNELS))]
        assert not [
            n for n in names if under(n, "kp_compiler.backend", "kp_compiler.pipeline", "kp_compiler.capture")
        ]
    if folder == "lowering":
        assert not [
            n for n in names if under(n, "kp_compiler.passes", "kp_compiler.pipeline", "kp_compiler.backend")
        ]
    top = [
        n for node in tree.body if not isinstance(node, DEFINITIONS) for n in imports(ast.Module([node], []))
    ]
    libraries = {"triton", "transformer_engine", "flash_attn", "transformers", "cutlass"}
    if path.parent.name == "triton":  # kernels, which are imported inside functions only
        libraries.remove("triton")
    assert not [n for n in top if under(n, *libraries)]


def attribute(node: ast.AST) -> str:
    """`torch.cuda.is_available` of the expression that says so."""
    if isinstance(node, ast.Attribute):
        return f"{attribute(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_who_asks_the_machine(path: Path) -> None:
    """Only target.py asks torch.cuda what there is, only it and config.py read the environment, and only what
    runs on the command line prints."""
    tree = ast.parse(path.read_text())
    said = {attribute(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if path.name != "target.py":
        # of a tensor; of this process; of streams
        streams = {"is_current_stream_capturing", "current_stream", "Stream", "stream"}
        allowed = {f"torch.cuda.{n}" for n in ("device_of", "is_initialized", *streams)}
        timing = {"synchronize", "Event", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache"}
        asked = {n for n in said if n.startswith("torch.cuda.") and n.split(".")[2] not in timing}
        assert asked <= allowed
    if path.name not in ("config.py", "target.py"):
        assert not {n for n in said if n.startswith(("os.environ", "os.getenv"))}
    if path.name not in ("cli.py", "doctor.py") and "demos" not in path.parts:
        calls = {attribute(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "print" not in calls


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_global_is_changed(path: Path) -> None:
    """No assignment to an attribute of torch or of a configuration module."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        for target in targets:
            name = attribute(target)
            assert not name.startswith("torch."), f"line {node.lineno}: {name}"
            assert not name.startswith("inductor_config."), f"line {node.lineno}: {name}"
