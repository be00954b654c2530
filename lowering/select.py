"""Choosing blocks as operators: lists for `kp::attend` from q, k and the mask.

    blocks = kp.select_blocks(q, k, flags, gates, scalars, spec)   by blocks of queries
    heads  = kp.dense_heads(q, k, v, …, *blocks, spec)             flags of those that compute everything
    blocks + kp.turn_blocks(*blocks, keys, block)                  by blocks of keys, to train

None has a gradient: it is that of attention over the blocks that were chosen. Heads that share a choice share
its list; heads that compute everything share one list of everything.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.fingerprint import stamped
from kp_compiler.lowering.ops import fragment, parse_spec
from kp_compiler.lowering.selection import ESTIMATING, choose, lists, measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec, SparseSpec

_FOUR = "(Tensor edges, Tensor count, Tensor at, Tensor blocks)"
_SELECT = f"(Tensor q, Tensor k, Tensor[] flags, Tensor[] gates, SymInt[] scalars, str spec) -> {_FOUR}"
_TURN = f"{_FOUR[:-1]}, SymInt keys, int block) -> {_FOUR}"
_HEADS = (
    f"(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars, {_FOUR[1:-1]}, str spec) -> Tensor"
)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def select_blocks() -> Any:
    """`kp::select_blocks`: q [B,H,S,D], k [B,K,T,D]; the tensors of `block_lists.Lists` by blocks of queries.
    `flags` is empty where the mask is one of inequalities, else the partly and the wholly kept blocks
    [B or 1,1,rows,blocks]."""
    _operators()
    return torch.ops.kp.select_blocks.default


def turn_blocks() -> Any:
    """`kp::turn_blocks`: the same lists by blocks of keys, of which there are as many as `keys` need."""
    _operators()
    return torch.ops.kp.turn_blocks.default


def dense_heads() -> Any:
    """`kp::dense_heads`: flags [B,H] of the heads that compute all blocks: the spec's `dense`, and those
    whose output over the chosen blocks is further off than its `error` (`selection.measure`)."""
    _operators()
    return torch.ops.kp.dense_heads.default


@cache
def _operators() -> tuple[Any, ...]:
    """Define the operators, once."""
    key = "CompositeExplicitAutograd"
    return (
        fragment("select_blocks", _SELECT, {key: _select}, _select_fake),
        fragment("turn_blocks", _TURN, {key: _turn}, _turn_fake),
        fragment("dense_heads", _HEADS, {key: _dense}, _dense_fake),
    )


def site_of(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    flags: list[Tensor],
    scalars: list[Any],
    gates: Sequence[Tensor] = (),
) -> Site:
    forms = mask_render.inequalities(spec.mask)
    if spec.sparse is None:
        raise ValueError("kp::select_blocks: the spec chooses no blocks")
    if forms is None and len(flags) != 2:
        raise ValueError(f"kp::select_blocks: the mask {spec.mask} needs two tensors of flags")
    given = (flags[0], flags[1]) if forms is None else None
    return Site(spec, spec.sparse, q, k, scalars, forms, given, gates)


def _select(
    q: Tensor, k: Tensor, flags: list[Tensor], gates: list[Tensor], scalars: list[Any], spec: str
) -> Four:
    found = lists.by_query(site_of(parse_spec(spec), q, k, flags, scalars, gates))
    return found.edges, found.count, found.at, found.blocks


def _select_fake(q: Tensor, k: Tensor, flags: Any, gates: Any, scalars: Any, spec: str) -> Four:
    sparse = parse_spec(spec).sparse
    assert sparse is not None
    rows, blocks = ((x.shape[2] + sparse.block - 1) // sparse.block for x in (q, k))
    batch, heads = q.shape[0], (k if sparse.shared else q).shape[1]
    size = batch * heads * rows * choose.capacity(sparse, blocks)
    return _four(q, (batch, heads, rows), size)


def _turn(edges: Tensor, count: Tensor, at: Tensor, blocks: Tensor, keys: int, block: int) -> Four:
    found = lists.by_key(Lists(edges, count, at, blocks), -(-keys // block))
    return found.edges, found.count, found.at, found.blocks


def _turn_fake(edges: Tensor, count: Tensor, at: Tensor, blocks: Tensor, keys: Any, block: int) -> Four:
    batch, heads = edges.shape[:2]
    return _four(edges, (batch, heads, (keys + block - 1) // block), blocks.shape[0] + batch * heads)


def _dense(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], *rest: Any) -> Tensor:
    *lists, text = rest
    spec = parse_spec(text)
    assert spec.sparse is not None
    site = Site(spec, spec.sparse, q, k, scalars, None)
    found = measure.dense_heads(site, v, lambda: measure.sampled(site, Lists(*lists)), operands)
    return found.expand(q.shape[:2]).contiguous()


def _dense_fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.bool)


def _four(like: Tensor, lines: tuple[Any, ...], size: Any) -> Four:
    edges, count = (like.new_empty(lines, dtype=torch.int32) for _ in range(2))
    at = like.new_empty(lines, dtype=torch.int64)
    return edges, count, at, like.new_empty((size,), dtype=torch.int32)


# --------------------------------------------------------------------------------------------------- lowering


def refused(spec: AttentionSpec, shape: AttentionShape) -> Rejection | None:
    """Why a site's blocks can't be chosen as its spec says."""
    sparse = spec.sparse
    assert sparse is not None
    if spec.mask.kind == "tensor":
        return Rejection("mask-unproved", "Blocks are chosen under masks that are proved only.")
    if spec.dead_rows in ("mean", "nan"):
        return Rejection(
            "dead-rows", "Queries without a key would be taken for those that no chosen block has a key for."
        )
    if spec.biases and sparse.selector in ESTIMATING:
        return Rejection(
            "bias", f"{sparse.selector} estimates probabilities from q and k; a bias shifts them."
        )
    if spec.biases and sparse.error is not None:
        return Rejection("bias", "Errors are measured for scores of q and k; a bias shifts them.")
    if sparse.selector == "vertical_slash" and mask_render.inequalities(spec.mask) is None:
        return Rejection(
            "last-queries",
            f"vertical_slash asks the last queries, which under {spec.mask} see little or nothing.",
        )
    if any(not 0 <= head < shape.heads for head in sparse.dense):
        return Rejection("heads", f"Heads {list(sparse.dense)} are to be dense, there are {shape.heads}.")
    return None


def emit_flags(emit: Any, node: Node, spec: AttentionSpec) -> list[Node]:
    """What `site_of` takes of a `kp.attention` node's mask beside its formula."""
    from kp_compiler.lowering.block_mask import block_flags

    assert spec.sparse is not None
    bounded = mask_render.inequalities(spec.mask) is not None
    return [] if bounded else list(block_flags(emit, node, spec, spec.sparse.block))


def emit_lists(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> list[Node]:
    """Lists of the blocks that a `kp.attention` node's selector chooses, by blocks of keys too where it
    trains."""
    from kp_compiler.lowering.block_mask import visit_lists

    sparse = spec.sparse
    assert sparse is not None
    q, k, v = (emit.call(torch.ops.aten.detach.default, x) for x in node.args[:3])
    flags, text = emit_flags(emit, node, spec), stamped(spec)
    gates = [node.args[3][i] for i in sparse.gates]
    found = _items(emit, emit.call(select_blocks(), q, k, flags, gates, node.args[4], text))
    both = [found]
    if shape.training:
        both.append(_items(emit, emit.call(turn_blocks(), *found, emit.size(k, 2), sparse.block)))
    if not sparse.dense and sparse.error is None:
        return [x for each in both for x in _for_group(emit, sparse, shape, each)]
    heads = emit.call(dense_heads(), q, k, v, node.args[3], node.args[4], *found, text)
    everything = visit_lists(emit, node, spec, sparse.block)
    lists: list[Node] = []
    for each, whole in zip(both, (everything[:4], everything[4:]), strict=False):
        lists += _replaced(emit, heads, _for_group(emit, sparse, shape, each), whole)
    return lists


def lists_now(
    q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], scalars: Sequence[int], spec: AttentionSpec,
    *, training: bool,
) -> list[Tensor]:  # fmt: skip
    """`emit_lists` of tensors that are there."""
    from kp_compiler.lowering.block_mask import Now

    node: Any = SimpleNamespace(args=(q, k, v, list(operands), list(scalars)))
    (batch, heads, queries, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    shape = AttentionShape(
        batch, heads, kv_heads, queries, keys, width, v.shape[3], q.dtype, q.device.type, training
    )
    found: list[Any] = emit_lists(Now(), node, spec, shape)
    return found


def _items(emit: Any, four: Node) -> list[Node]:
    return [emit.call(operator.getitem, four, i) for i in range(4)]


def _for_group(emit: Any, sparse: SparseSpec, shape: AttentionShape, lists: list[Node]) -> list[Node]:
    """Lists of key heads as those of all their query heads: the same blocks in memory."""
    group = shape.heads // shape.kv_heads
    if not sparse.shared or group == 1:
        return lists
    return [*(emit.call(torch.repeat_interleave, x, group, dim=1) for x in lists[:3]), lists[3]]


def _replaced(emit: Any, heads: Node, lists: list[Node], whole: list[Node]) -> list[Node]:
    """Lists in which some heads [B,H] have those of `whole`."""
    call = emit.call
    heads = call(torch.unsqueeze, heads, -1)
    at = call(torch.add, whole[2], emit.size(lists[3], 0))
    lines = [call(torch.where, heads, a, b) for a, b in zip((*whole[:2], at), lists[:3], strict=True)]
    return [*lines, call(torch.cat, [lists[3], whole[3]])]
