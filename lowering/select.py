"""Choosing blocks as operators: lists for `kp::attend` from q, k and the mask.

    blocks = kp.select_blocks(q, k, flags, scalars, spec)          by blocks of queries
           + kp.turn_blocks(*blocks, keys, block)                  by blocks of keys, to train

Neither has a gradient: it is that of attention over the blocks that were chosen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.ops import parse_spec
from kp_compiler.lowering.selection import choose, lists
from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import AttentionSpec

_FOUR = "(Tensor edges, Tensor count, Tensor at, Tensor blocks)"
_SELECT = f"(Tensor q, Tensor k, Tensor[] flags, SymInt[] scalars, str spec) -> {_FOUR}"
_TURN = f"{_FOUR[:-1]}, SymInt keys, int block) -> {_FOUR}"
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


@cache
def _operators() -> tuple[Any, Any]:
    """Define both operators, once."""
    select = torch.library.custom_op("kp::select_blocks", _select, mutates_args=(), schema=_SELECT)
    select.register_fake(_select_fake)
    turn = torch.library.custom_op("kp::turn_blocks", _turn, mutates_args=(), schema=_TURN)
    turn.register_fake(_turn_fake)
    return select, turn


def site_of(spec: AttentionSpec, q: Tensor, k: Tensor, flags: list[Tensor], scalars: list[Any]) -> Site:
    forms = mask_render.inequalities(spec.mask)
    if spec.sparse is None:
        raise ValueError("kp::select_blocks: the spec chooses no blocks")
    if forms is None and len(flags) != 2:
        raise ValueError(f"kp::select_blocks: the mask {spec.mask} needs two tensors of flags")
    return Site(spec, spec.sparse, q, k, scalars, forms, (flags[0], flags[1]) if forms is None else None)


def _select(q: Tensor, k: Tensor, flags: list[Tensor], scalars: list[Any], spec: str) -> Four:
    found = lists.by_query(site_of(parse_spec(spec), q, k, flags, scalars))
    return found.edges, found.count, found.at, found.blocks


def _select_fake(q: Tensor, k: Tensor, flags: list[Tensor], scalars: list[Any], spec: str) -> Four:
    sparse = parse_spec(spec).sparse
    assert sparse is not None
    rows, blocks = ((x.shape[2] + sparse.block - 1) // sparse.block for x in (q, k))
    batch, heads = q.shape[:2]
    size = batch * heads * rows * choose.capacity(sparse, blocks)
    return _four(q, (batch, heads, rows), size)


def _turn(edges: Tensor, count: Tensor, at: Tensor, blocks: Tensor, keys: int, block: int) -> Four:
    found = lists.by_key(Lists(edges, count, at, blocks), -(-keys // block))
    return found.edges, found.count, found.at, found.blocks


def _turn_fake(edges: Tensor, count: Tensor, at: Tensor, blocks: Tensor, keys: Any, block: int) -> Four:
    batch, heads = edges.shape[:2]
    return _four(edges, (batch, heads, (keys + block - 1) // block), blocks.shape[0] + batch * heads)


def _four(like: Tensor, lines: tuple[Any, ...], size: Any) -> Four:
    edges, count = (like.new_empty(lines, dtype=torch.int32) for _ in range(2))
    at = like.new_empty(lines, dtype=torch.int64)
    return edges, count, at, like.new_empty((size,), dtype=torch.int32)
