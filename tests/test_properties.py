"""Random attention subgraphs: recognised, and as close to float64 as rounding allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers import evaluate, relative_error, run_both

B, H = 2, 4
SETTINGS = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # shrinking costs minutes, each example compiles
)


@dataclass(frozen=True)
class Draw:
    """One way to write attention."""

    layout: str  # of q, k and v
    product: str
    scale: str
    mask: str
    spelling: str  # of the mask
    cast: bool
    dropout: bool
    softcap: bool
    bias: str
    groups: str
    queries: int
    keys: int
    width: int
    train: bool


DRAWS = st.builds(
    Draw,
    layout=st.sampled_from(["bhsd", "bshd", "folded"]),
    product=st.sampled_from(["matmul", "einsum", "bmm"]),
    scale=st.sampled_from(["scores", "query", "key", "both", "divided"]),
    mask=st.sampled_from(["none", "causal", "window", "chunked", "prefix", "padding", "causal+padding"]),
    spelling=st.sampled_from(["masked_fill", "where", "add", "sub"]),
    cast=st.booleans(),
    dropout=st.booleans(),
    softcap=st.booleans(),
    bias=st.sampled_from(["none", "heads", "keys"]),
    groups=st.sampled_from(["none", "repeat_interleave", "expand"]),
    queries=st.sampled_from([1, 7, 20]),
    keys=st.sampled_from([20, 31]),
    width=st.sampled_from([8, 24]),
    train=st.booleans(),
)


def keep(draw: Draw, padding: torch.Tensor) -> torch.Tensor:
    """The mask as user code builds it. Its first key is always seen: no row is dead."""
    rows = torch.arange(draw.queries)[:, None] + (draw.keys - draw.queries)
    columns = torch.arange(draw.keys)[None, :]
    causal = columns <= rows
    return {
        "causal": causal,
        "window": causal & (columns > rows - 6),
        "chunked": causal & (columns // 8 == rows // 8),
        "prefix": causal | (columns < 5),
        "padding": (padding != 0)[:, None, None, :],
        "causal+padding": causal & (padding != 0)[:, None, None, :],
    }[draw.mask]


def scores_of(draw: Draw, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scale = draw.width**-0.5
    if draw.scale in ("query", "both"):
        q = q * (scale if draw.scale == "query" else scale**0.5)
    if draw.scale in ("key", "both"):
        k = k * (scale if draw.scale == "key" else scale**0.5)
    if draw.product == "einsum":
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
    elif draw.product == "bmm":
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(
            B, H, draw.queries, draw.keys
        )
    else:
        scores = q @ k.transpose(-2, -1)
    if draw.scale == "scores":
        return scores * scale
    return scores / draw.width**0.5 if draw.scale == "divided" else scores


def masked(draw: Draw, scores: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    if draw.mask == "none":
        return scores
    mask, lowest = keep(draw, padding), torch.finfo(torch.float32).min
    if draw.spelling == "masked_fill":
        return scores.masked_fill(~mask, float("-inf"))
    if draw.spelling == "where":
        return torch.where(mask, scores, lowest)
    if draw.spelling == "add":
        return scores + torch.where(mask, 0.0, lowest)
    return scores - (1.0 - mask.to(scores.dtype)) * -lowest


def heads(draw: Draw, x: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """To [B, heads, length, width]."""
    if draw.layout == "bshd":
        return x.transpose(1, 2)
    return x.view(B, count, length, draw.width) if draw.layout == "folded" else x


def repeated(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    if draw.groups == "repeat_interleave":
        return x.repeat_interleave(2, dim=1)
    if draw.groups == "expand":
        return x[:, :, None].expand(B, H // 2, 2, draw.keys, draw.width).reshape(B, H, draw.keys, draw.width)
    return x


def attention(draw: Draw) -> Callable[..., torch.Tensor]:
    count = H if draw.groups == "none" else H // 2

    def function(q, k, v, bias, padding):
        q = heads(draw, q, draw.queries, H)
        k, v = (repeated(draw, heads(draw, x, draw.keys, count)) for x in (k, v))
        scores = scores_of(draw, q, k)
        if draw.softcap:
            scores = 3.0 * torch.tanh(scores / 3.0)
        if draw.bias != "none":
            scores = scores + bias
        scores = masked(draw, scores, padding)
        if draw.cast:
            probs = F.softmax(
                scores, dim=-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32
            )
            probs = probs.to(q.dtype)
        else:
            probs = scores.softmax(-1)
        if draw.dropout:
            probs = F.dropout(probs, p=0.0, training=True)
        out = probs @ v
        return out.transpose(1, 2).reshape(B, draw.queries, H * draw.width)

    return function


def inputs(draw: Draw) -> tuple[Any, ...]:
    def tensor(length: int, count: int) -> torch.Tensor:
        shape = {
            "bhsd": (B, count, length, draw.width),
            "bshd": (B, length, count, draw.width),
            "folded": (B * count, length, draw.width),
        }[draw.layout]
        return torch.randn(shape)

    count = H if draw.groups == "none" else H // 2
    bias = (
        torch.randn(H, draw.queries, draw.keys) if draw.bias == "heads" else torch.randn(B, 1, 1, draw.keys)
    )
    padding = torch.randint(0, 2, (B, draw.keys)).index_fill(1, torch.arange(2), 1)
    return tensor(draw.queries, H), tensor(draw.keys, count), tensor(draw.keys, count), bias, padding


def check(draw: Draw, kernel: str) -> None:
    torch._dynamo.reset()
    function, arguments = attention(draw), inputs(draw)
    outcome = run_both(function, arguments, train=draw.train, options={"attention": {"impl": kernel}})
    (site,) = outcome.report.sites
    accepted = {"rewritten"} if kernel == "reference" else {"rewritten", "refused"}
    assert site.status in accepted, outcome.report.why("")
    if site.status == "rewritten":
        known = {"none": ("full",), "causal": ("causal", "full")}.get(draw.mask, tuple(draw.mask.split("+")))
        if draw.queries == 1:  # every mask is then a formula of the key alone
            known = (*known, "pointwise")
        assert any(name in str(site.spec) for name in (*known, "full", "causal")), site.spec
        assert "tensor" not in str(site.spec)
        assert ("softcap" in str(site.spec)) == draw.softcap
        assert ("bias" in str(site.spec)) == (draw.bias != "none")
    wide = tuple(x.double() if x.is_floating_point() else x for x in arguments)
    exact = evaluate(function, wide, draw.train)
    for got, want, reference in zip(outcome.got, outcome.want, exact, strict=True):
        assert relative_error(got, reference) <= 3.0 * relative_error(want, reference) + 1e-6


@SETTINGS
@given(DRAWS)
def test_random_attention_on_the_reference(draw: Draw) -> None:
    check(draw, "reference")


@SETTINGS
@given(DRAWS.filter(lambda d: d.width >= 16 and d.queries > 1))
def test_random_attention_on_flex(draw: Draw) -> None:
    """What FlexAttention refuses (bias gradients) stays right as well."""
    check(draw, "flex")
