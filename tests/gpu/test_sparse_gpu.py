"""The pass on a GPU: what `verify` says of every way to choose blocks, and what the first call measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kp_compiler as kp
from kp_compiler import gates

pytestmark = pytest.mark.gpu
LENGTH = 2900


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2], device=q.device)
    away = index[:, None] - index
    return F.scaled_dot_product_attention(q, k, v, (away >= 0) & (away < 1500), enable_gqa=True)


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2], device=q.device)
    same = (index // 1300) == (index[:, None] // 1300)
    return F.scaled_dot_product_attention(q, k, v, same & (index <= index[:, None]), enable_gqa=True)


def inputs(width: int, dtype: torch.dtype, length: int = LENGTH) -> list[Tensor]:
    def one(heads: int) -> Tensor:
        x = torch.randn(2, length, heads, width, device="cuda", dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    return [one(4), one(2), one(2)]


def explained(function: Any, given: list[Tensor], **settings: Any) -> kp.SiteRecord:
    sparse = {"mode": "require", "min_tokens": 0, "sparsity": 0.6, **settings}
    report = kp.explain(
        function, *given, options={"verify": True, "strict": True, "sparse_attention": sparse}
    )
    (site,) = report.sites
    return site


WAYS: dict[str, dict[str, Any]] = {
    "budget": {}, "mass": {"sparsity": None, "mass": 0.6}, "error": {"error": 0.5},
    "every head off": {"error": 0.0}, "dense heads": {"dense_heads": {"": [1, 2]}},
    "shared": {"shared": True},
    "shared, dense heads": {"shared": True, "dense_heads": {"": [3]}},
    "sampled": {"estimate": "sampled"}, "antidiagonal": {"estimate": "antidiagonal"},
    "vertical_slash": {"selector": "vertical_slash"},
    "structured": {"selector": "structured"}, "random": {"selector": "random", "seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [causal, windowed, documents])
def test_verified(function: Any, way: str) -> None:
    if function is documents and way == "vertical_slash":
        pytest.skip("refused: tests/test_sparse_attention.py")
    site = explained(function, inputs(64, torch.bfloat16), **WAYS[way])
    assert site.impl == "triton" and str(site.verified).startswith("ok: out"), site.verified
    assert site.predicted is not None
    found = site.predicted["measured"]
    assert 0 < found["density"] <= 1 and found["kept_mass"] <= 1
    assert found["dense_heads"] == {"every head off": [0, 1, 2, 3], "dense heads": [1, 2],
                                    "shared, dense heads": [3]}.get(way, found["dense_heads"])  # fmt: skip


@pytest.mark.parametrize("width", [96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heads(width: int, dtype: torch.dtype) -> None:
    site = explained(causal, inputs(width, dtype, 1500))
    assert str(site.verified).startswith("ok: out"), site.verified


def test_learned(tmp_path: Path) -> None:
    given, path = inputs(64, torch.bfloat16), str(tmp_path / "gates.safetensors")
    options = {"sparse_attention": {"min_tokens": 0}}
    losses = kp.train_selectors(causal, [tuple(given)], path, steps=20, options=options)
    assert list(losses) == [""] and gates.load(path)[""][0].shape == (4, 64, 32)
    site = explained(causal, given, selector="learned", gates=path)
    assert "learned" in str(site.spec) and str(site.verified).startswith("ok: out"), site.verified


def test_cuda_graphs() -> None:
    """Nothing of it waits for the device: choices are made anew at each replay."""
    options = {"sparse_attention": {"mode": "require", "min_tokens": 0, "error": 0.9}}
    compiled = torch.compile(causal, backend="kp", options={**options, "mode": "reduce-overhead"})
    plain = torch.compile(causal, backend="kp", options=options)
    for _ in range(4):
        given = [x.detach() for x in inputs(64, torch.bfloat16)]
        with torch.no_grad():
            assert torch.equal(compiled(*given).clone(), plain(*given))
