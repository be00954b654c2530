"""FlexAttention as kp writes it into a graph: ragged lengths, and block lists that skip nothing needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import captured_graphs, recorded_calls, run_both

FLEX = {"attention": {"impl": "flex", "expect": 1}}
B, H, KV, D, BLOCK = 2, 4, 2, 16, 128
LENGTHS = [128, 129, 300]


def lines(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    return rows[:, None], columns[None, :]


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * D**-0.5


def causal(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=columns <= rows)


def window(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(columns <= rows) & (columns > rows - 20))


def symmetric_window(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(rows - columns).abs() < 20)


def document(q, k, v, position_ids, *_):
    segments = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = segments[:, :, None] == segments[:, None, :]
    mask = (same & (position_ids[:, None, :] <= position_ids[:, :, None]))[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def unordered_document(q, k, v, _, label):
    """Labels in any order: nothing but equality may be assumed of them."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(label[:, :, None] == label[:, None, :])[:, None]
    )


def padding(q, k, v, _, label):
    rows, columns = lines(q, k)
    mask = (columns <= rows) & (label != 0)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def slice_of_a_longer_padding(q, k, v, _, label):
    longer = torch.cat([label, label], dim=1).contiguous()
    mask = (longer[:, : k.shape[2]] != 0)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def prefix(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(columns <= rows) | (columns < 37))


def prefix_of_each_batch(q, k, v, _, label):
    rows, columns = lines(q, k)
    mask = ((columns <= rows) | (columns < label[:, :1, None] * 40))[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def chunked(q, k, v, *_):
    rows, columns = lines(q, k)
    mask = (rows // 50 == columns // 50) & (columns <= rows)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def strided(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=((rows - columns) % 7 == 0))


def not_a_window(q, k, v, *_):
    rows, columns = lines(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~((columns < rows) & (columns > rows - 20)))


def softcap(q, k, v, *_):
    rows, columns = lines(q, k)
    capped = torch.tanh(scores(q, k) / 1.5) * 1.5
    return F.softmax(capped.masked_fill(columns > rows, -math.inf), dim=-1) @ v


def sink(q, k, v, *_):
    rows, columns = lines(q, k)
    logit = torch.linspace(-1.0, 1.0, H, device=q.device).reshape(1, -1, 1, 1).expand(B, -1, q.shape[2], -1)
    lowest = max(torch.finfo(q.dtype).min, torch.finfo(torch.float32).min)
    masked = scores(q, k) + torch.where(columns <= rows, 0.0, lowest)
    return F.softmax(torch.cat([masked, logit], dim=-1), dim=-1)[..., :-1] @ v


def alibi(q, k, v, *_):
    rows, columns = lines(q, k)
    slopes = torch.tensor([2.0**-n for n in range(1, H + 1)], device=q.device).view(H, 1, 1)
    biased = scores(q, k) + slopes * columns
    return F.softmax(biased.masked_fill(columns > rows, -math.inf), dim=-1) @ v


def bias(q, k, v, *_):
    rows, columns = lines(q, k)
    term = torch.cos((rows - columns) * 0.1)
    return F.softmax(scores(q, k) + 2.0 * term, dim=-1) @ v


MASKS = [
    causal, window, symmetric_window, document, unordered_document, padding, slice_of_a_longer_padding,
    prefix, prefix_of_each_batch, chunked, strided, not_a_window,
]  # fmt: skip
SCORES = [softcap, sink, alibi, bias]


def inputs(length: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(B, H, length, D) for _ in range(3))
    position_ids = torch.stack([torch.arange(length).remainder(61), torch.arange(length).remainder(140)])
    return q, k, v, position_ids, torch.randint(0, 3, (B, length)).index_fill(1, torch.tensor([0]), 1)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("function", [*MASKS, *SCORES], ids=lambda f: f.__name__)
def test_flex(function: Callable[..., torch.Tensor], length: int, train: bool) -> None:
    if train and length != 129:
        pytest.skip("gradients at one ragged length")
    outcome = run_both(function, inputs(length), train=train, options=FLEX)
    assert [(s.status, s.impl) for s in outcome.report.sites] == [("rewritten", "flex")], outcome.report.why(
        ""
    )
    assert len(outcome.got) == (4 if train else 1)
    assert outcome.error < 1e-5


@pytest.mark.parametrize(
    "function", [window, document, padding, prefix, softcap, sink], ids=lambda f: f.__name__
)
def test_nothing_of_size_n_squared_is_left(function: Callable[..., torch.Tensor]) -> None:
    """No mask and no scores; block lists are of size (N / 128)²."""
    length = 389
    (graph,) = captured_graphs(function, *inputs(length), options={**FLEX, "strict": True})
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("flex_attention") == 1
    assert not any("softmax" in t or "scaled_dot_product" in t for t in targets)
    assert not [n for n in graph.graph.nodes if is_square(n.meta.get("example_value"), length)]


def is_square(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and sum(size >= length for size in value.shape) >= 2


def test_grouped_heads_and_cross_lengths() -> None:
    """K and V keep their own heads, S differs from T."""

    def function(q, k, v):
        rows, columns = lines(q, k)
        k, v = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=columns <= rows + 71)

    tensors = torch.randn(B, H, 229, D), torch.randn(B, KV, 300, D), torch.randn(B, KV, 300, 32)
    outcome = run_both(function, tensors, train=True, options=FLEX)
    assert outcome.report.sites[0].shape.startswith("B2 H4:2 S229x300")
    assert outcome.error < 1e-5


def test_dynamic_length_is_compiled_once() -> None:
    import kp_compiler

    options = {"cpu_rewrites": True, "lowering": "aot_eager", "strict": True, **FLEX}
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        compiled = torch.compile(document, backend="kp", options=options, fullgraph=True)
        for length in (140, 256, 301):
            tensors = inputs(length)
            for tensor in tensors[:3]:
                torch._dynamo.mark_dynamic(tensor, 2)
            for tensor in tensors[3:]:
                torch._dynamo.mark_dynamic(tensor, 1)
            torch.testing.assert_close(compiled(*tensors), document(*tensors))
    assert len(reports) == 1


def test_bias_with_gradient_is_refused() -> None:
    def function(q, k, v, table):
        rows, columns = lines(q, k)
        term = F.embedding((columns - rows).clamp(-8, 7) + 8, table).permute(2, 0, 1)
        return F.softmax(scores(q, k) + term, dim=-1) @ v

    tensors = (*inputs(129)[:3], torch.randn(16, H))
    outcome = run_both(function, tensors, train=True, options={"attention": {"impl": "flex"}})
    assert [site.reason.code for site in outcome.report.sites if site.reason] == ["bias-grad"]
    assert outcome.error < 1e-5


# ------------------------------------------------------------------------------------------------ block lists


def dense_mask(call: tuple[Any, ...], length: int) -> torch.Tensor:
    """The mask function of a FlexAttention call, everywhere."""
    mask_mod, buffers = call[4][-1], call[8]
    index = [torch.arange(n, dtype=torch.int32) for n in (B, H, length, length)]
    over = torch.vmap
    function = lambda b, h, q, k: mask_mod(b, h, q, k, *buffers)  # noqa: E731
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = over(function, in_dims=dims)
    return function(*index)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Block lists as flags [Bm, 1, rows, columns]."""
    flags = torch.zeros(*indices.shape[:3], indices.shape[3], dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        flags[tuple(place)][indices[tuple(place)][: counts[tuple(place)]].long()] = True
    return flags


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("function", MASKS, ids=lambda f: f.__name__)
def test_block_lists(function: Callable[..., torch.Tensor], length: int) -> None:
    """A block with anything to see is visited, a full one is full, the lists by key block say the same."""
    tensors = inputs(length)
    (call,) = recorded_calls(function, tensors, "flex_attention", FLEX)
    _, _, kv_num, kv_indices, full_num, full_indices, q_num, q_indices, full_q_num, full_q_indices = call[4][
        :10
    ]
    partial, full = listed(kv_num, kv_indices), listed(full_num, full_indices)
    mask = dense_mask(call, length)
    count = -(-length // BLOCK)
    pad = count * BLOCK - length
    blocked = (B, H, count, BLOCK, count, BLOCK)
    seen = F.pad(mask, (0, pad, 0, pad), value=False).reshape(blocked).transpose(3, 4).flatten(4)
    held = F.pad(mask, (0, pad, 0, pad), value=True).reshape(blocked).transpose(3, 4).flatten(4)
    partial, full = partial.expand(B, H, -1, -1), full.expand(B, H, -1, -1)
    assert not (seen.any(-1) & ~(partial | full)).any(), "a block that is needed is skipped"
    assert not (full & ~held.all(-1)).any(), "a block said to be full is not"
    assert not (partial & full).any()
    assert torch.equal(listed(q_num, q_indices).expand(B, H, -1, -1).mT, partial)
    assert torch.equal(listed(full_q_num, full_q_indices).expand(B, H, -1, -1).mT, full)


def test_windows_visit_few_blocks() -> None:
    """The lists are there to skip: a window of 20 visits two blocks a row, a document its own."""
    tensors = inputs(1024)
    (call,) = recorded_calls(window, tensors, "flex_attention", FLEX)
    assert int((call[4][2] + call[4][4]).max()) <= 2
    (call,) = recorded_calls(causal, tensors, "flex_attention", FLEX)
    assert (call[4][2] + call[4][4]).flatten().tolist() == list(range(1, 9))
    assert call[4][4].flatten().tolist() == list(range(8))
    (call,) = recorded_calls(document, tensors, "flex_attention", FLEX)
    assert int((call[4][2] + call[4][4])[0].max()) <= 2


@pytest.mark.parametrize("function", [causal, padding, document])
def test_strides_of_block_lists_leave_nothing_open(function: Callable[..., torch.Tensor]) -> None:
    """The kernel finds a batch's lists by the stride of their one head, and Inductor may choose that of a
    dimension of size 1. So lists with a batch are handed over with every stride said."""
    q, (k, v) = torch.randn(B, H, 300, D), (torch.randn(B, H, 300, D) for _ in range(2))
    positions = torch.arange(300).remainder(100).expand(B, 300).contiguous()
    graph = captured_graphs(function, q, k, v, positions, positions + 1, options=FLEX)[0].graph
    (site,) = [node for node in graph.nodes if str(node.target) == "flex_attention"]
    lists = [x for x in site.args[4] if isinstance(x, torch.fx.Node) and x.op == "call_function"]
    assert len(lists) == 8
    for node in lists:
        sizes = node.meta["example_value"].shape
        if sizes[0] == 1:
            continue
        assert node.target is torch.ops.aten.as_strided.default
        assert tuple(node.args[2]) == torch.empty(sizes).stride()
    assert (sizes[0] == 1) == (function is causal)
