"""Settings of `impl="te"`."""

from __future__ import annotations

import dataclasses
from typing import Any

from kp_compiler import config
from kp_compiler import target as targets
from kp_compiler.lowering.fp8.recipes import Fp8Spec

HERE = targets.parse("cuda:sm90")
HOPPER = dataclasses.replace(HERE, has_te=True)
M = 40


def settings(**changes: Any) -> config.Fp8LinearConfig:
    return config.Fp8LinearConfig(impl="te", **changes)


def options(**changes: Any) -> dict[str, Any]:
    return {"fp8_linear": {"mode": "on", "impl": "te", **changes}}


def spec_of(**changes: Any) -> Fp8Spec:
    plan = Fp8Spec("tensorwise", "e5m2", False, ("fprop",), False, "bfloat16")
    return dataclasses.replace(plan, **changes)
