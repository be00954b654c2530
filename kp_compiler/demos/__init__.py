"""Demonstrations: `kp demo` lists them, `kp demo NAME` runs one.

A demo checks what it shows: it returns 1 where a number it prints is out of its stated bound. Quick runs take
at most a minute, validated ones at most three, on two CPU cores or one GPU. A new demo is one file here and
one entry below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kp_compiler.demos import attention, fp8, masks, ring, sparse


@dataclass(frozen=True)
class Demo:
    """`run(validate)` prints and returns an exit code; `example()` gives (model, args, kwargs)."""

    name: str
    summary: str
    run: Callable[[bool], int]
    example: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]


DEMOS: dict[str, Demo] = {
    demo.name: demo
    for demo in (
        Demo("attention", attention.SUMMARY, attention.run, attention.example),
        Demo("fp8", fp8.SUMMARY, fp8.run, fp8.example),
        Demo("masks", masks.SUMMARY, masks.run, masks.example),
        Demo("ring", ring.SUMMARY, ring.run, ring.example),
        Demo("sparse", sparse.SUMMARY, sparse.run, sparse.example),
    )
}
