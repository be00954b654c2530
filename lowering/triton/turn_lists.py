"""Kernels that turn lists by blocks of queries into lists by blocks of keys.

    mark    a byte for each pair of blocks that a line visits, some heads at a time
    count   of each column: visits, and those that apply the mask
    fill    the lines that visit it, those with the mask first, in order

What they read and write: B·H·(rows·blocks) bytes three times, and the lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kp_compiler.lowering.block_lists import Lists

BYTES = 2**28  # of marks in memory at a time
_TILE = {"TALL": 64, "WIDE": 64}


@triton.jit(do_not_specialize=["OTHERS", "LINES"])
def _mark(edges, count, at, blocks, marks, LINES, OTHERS, BLOCK: tl.constexpr):
    line = LINES + tl.program_id(0).to(tl.int64)
    first, edge, number = tl.load(at + line), tl.load(edges + line), tl.load(count + line)
    row = marks + (line - LINES) * OTHERS
    for start in range(0, number, BLOCK):
        place = start + tl.arange(0, BLOCK)
        block = tl.load(blocks + first + place, mask=place < number, other=0)
        tl.store(row + block, tl.where(place < edge, 1, 2).to(tl.int8), mask=place < number)


@triton.jit
def _kinds(marks, row, column, ROWS, OTHERS):
    there = (row < ROWS)[:, None] & (column < OTHERS)[None, :]
    return tl.load(marks + row.to(tl.int64)[:, None] * OTHERS + column[None, :], mask=there, other=0)


@triton.jit(do_not_specialize=["PAIR", "ROWS", "OTHERS"])
def _count(marks, edges, count, PAIR, ROWS, OTHERS, TALL: tl.constexpr, WIDE: tl.constexpr):
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    pair = tl.program_id(1).to(tl.int64)
    edge, number = tl.zeros([WIDE], tl.int32), tl.zeros([WIDE], tl.int32)
    for start in range(0, ROWS, TALL):
        kind = _kinds(marks + pair * ROWS * OTHERS, start + tl.arange(0, TALL), column, ROWS, OTHERS)
        edge += tl.sum((kind == 1).to(tl.int32), 0)
        number += tl.sum((kind > 0).to(tl.int32), 0)
    place = (PAIR + pair) * OTHERS + column
    tl.store(edges + place, edge, mask=column < OTHERS)
    tl.store(count + place, number, mask=column < OTHERS)


@triton.jit(do_not_specialize=["PAIR", "ROWS", "OTHERS"])
def _fill(marks, edges, at, blocks, PAIR, ROWS, OTHERS, TALL: tl.constexpr, WIDE: tl.constexpr):
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    pair = tl.program_id(1).to(tl.int64)
    place = (PAIR + pair) * OTHERS + column
    first = tl.load(at + place, mask=column < OTHERS, other=0)
    edge, whole = first, first + tl.load(edges + place, mask=column < OTHERS, other=0)
    for start in range(0, ROWS, TALL):
        row = start + tl.arange(0, TALL)
        kind = _kinds(marks + pair * ROWS * OTHERS, row, column, ROWS, OTHERS)
        partly, wholly = (kind == 1).to(tl.int32), (kind > 1).to(tl.int32)
        to = tl.where(kind == 1, edge[None, :] + tl.cumsum(partly, 0), whole[None, :] + tl.cumsum(wholly, 0))
        tl.store(blocks + to - 1, row[:, None] + tl.zeros([TALL, WIDE], tl.int32), mask=kind > 0)
        edge += tl.sum(partly, 0)
        whole += tl.sum(wholly, 0)


def turn(lists: Lists, others: int) -> Lists:
    """As `selection.lists.by_key`."""
    batch, heads, rows = lists.count.shape
    pairs, device = batch * heads, lists.at.device
    given = [x.contiguous() for x in lists.tensors()]
    edges, count = (torch.empty(batch, heads, others, dtype=torch.int32, device=device) for _ in "ec")
    at = torch.empty(batch, heads, others, dtype=torch.int64, device=device)
    most = lists.blocks.numel() // max(1, pairs) + 1
    blocks = torch.empty(pairs * most, dtype=torch.int32, device=device)
    step = max(1, BYTES // max(1, rows * others))
    with torch.cuda.device_of(lists.at):
        spans = [(first, min(step, pairs - first)) for first in range(0, pairs, step)]
        for first, size in spans:
            marks = _marked(given, first, size, rows, others)
            grid = (triton.cdiv(others, _TILE["WIDE"]), size)
            _count[grid](marks, edges, count, first, rows, others, **_TILE)
            starts = _starts(count, most, slice(first, first + size))
            at.view(pairs, others)[first : first + size] = starts
            _fill[grid](marks, edges, at, blocks, first, rows, others, **_TILE)
    return Lists(edges, count, at, blocks)


def _marked(given: list[Any], first: int, size: int, rows: int, others: int) -> Tensor:
    marks = torch.zeros(size, rows, others, dtype=torch.int8, device=given[0].device)
    _mark[(size * rows,)](*given, marks, first * rows, others, BLOCK=128)
    return marks


def _starts(count: Tensor, most: int, heads: slice) -> Tensor:
    """Where lines begin: those of a head one after the other, heads `most` apart."""
    count = count.flatten(0, 1)[heads]
    head = torch.arange(heads.start, heads.stop, device=count.device)[:, None] * most
    return count.cumsum(-1) - count + head
