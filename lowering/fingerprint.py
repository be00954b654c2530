"""A digest of kp's own code. AOTAutograd's and Inductor's cache keys do not contain it, so it travels in the
spec string of kp's ops and in the uuid of kp's Inductor pass: a changed formula is never served stale."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import kp_compiler


@cache
def fingerprint() -> str:
    """Sixteen hex digits over every source file of the three folders."""
    digest = hashlib.sha256()
    for package in ("kp_compiler", "kp_compiler.passes", "kp_compiler.lowering"):
        for folder in _folders(package):
            for path in sorted(folder.rglob("*.py")):
                content = path.read_bytes()
                digest.update(f"{package}/{path.relative_to(folder)} {len(content)} ".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def stamped(spec: Any) -> str:
    """A spec's JSON with the fingerprint in it."""
    return spec.to_json()[:-1] + f',"fingerprint":"{fingerprint()}"}}'


def _folders(package: str) -> list[Path]:
    import importlib

    module = importlib.import_module(package) if package != "kp_compiler" else kp_compiler
    return [Path(folder) for folder in module.__path__]
