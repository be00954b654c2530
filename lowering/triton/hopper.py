"""Launches of the Hopper kernels: what `triton.attention` does, where a site is one that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.into import Into, padded
from kp_compiler.lowering.triton.attention import (
    Site,
    Tile,
    described,
    forward_arguments,
    forward_layout,
    run,
    scaled,
    strided,
    tile_for,
)
from kp_compiler.lowering.triton.hopper_backward_source import (
    backward_parameters,
    backward_source,
    dq_part,
)
from kp_compiler.lowering.triton.hopper_source import hopper_parameters, hopper_source
from kp_compiler.lowering.triton.hopper_text import ROWS
from kp_compiler.lowering.triton.launches import Launches, alike
from kp_compiler.specs import AttentionSpec
from kp_compiler.target import detect

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_HALVES = (torch.bfloat16, torch.float16)
# Bytes of a chunk of heads, where the second-level cache of an H100 has 50 MiB. TFLOP/s, D128, causal
# (2026-11-27): forward, 4k and 8k tokens, 620 and 663, with half as much 608 and 648. Backward, one sequence
# of 8k, 16 heads for 4 of keys, and one of 16k, 16 heads: 529 and 586, with half as much 378 and 569.
_FORWARD, _BACKWARD = 32 * 2**20, 64 * 2**20
ADDING = ("backward", True, False)  # a launch that adds gradients to what is there


def takes(site: Site) -> bool:
    """Whether the forward kernel computes this site: half precision, heads of up to 256, those of values not
    larger, tensors that the tensor memory accelerator reads (sizes, strides and addresses in multiples of 16
    bytes), no dropout."""
    q, v = site.q, site.v
    if q.dtype not in _HALVES or padded(v.shape[3]) > padded(q.shape[3]) or q.shape[3] > 256:
        return False
    if site.block is not None and (site.block[0] % (2 * ROWS) or site.block[1] % 64):
        return False
    if site.spec.dropout_p:
        return False
    return all(described(x) for x in (q, site.k, v))


def gains(site: Site) -> bool:
    """Whether the forward kernel is faster than the portable one of smaller tiles. TFLOP/s with heads of
    64 by both: causal, 512 tokens 199 and 224, 1024 273 and 308, 2048 381 and 375; a window of 1024 keys 327
    and 363 (H100, 2026-11-27)."""
    mask = site.spec.mask
    return site.q.shape[3] > 64 or mask.kind == "full" or (mask.window or site.k.shape[2]) >= 2048


def takes_backward(site: Site, grad: Tensor) -> bool:
    """Whether `gradients` computes a site that the forward kernel takes: heads of up to 128, and blocks of
    lists that hold all keys of a program."""
    if site.block is not None and (site.block[0] % ROWS or site.block[1] % (2 * ROWS)):
        return False
    return site.q.shape[3] <= 128 and described(grad)


def _tile(kernel: str, site: Site) -> Tile:
    """64 queries for each of two or three warpgroups forward, 64 keys for each of two backward; not larger
    than blocks of lists, and smaller where score changes want more registers than a thread has (heads of 64:
    with a bias the larger forward tile has 600 instructions for local memory, with a cap the backward one
    400)."""
    tile = site.tiles.get(kernel) or tile_for(kernel, site.q.shape[3], 2)
    outer, inner, spec = tile.outer, tile.inner, site.spec
    queries, keys = site.block or (outer, inner)
    if kernel == "hopper backward":
        narrow = bool(spec.biases) or spec.softcap is not None or queries % inner != 0
        return Tile(outer, ROWS if narrow else inner, tile.warps, tile.stages)
    outer = 2 * ROWS if spec.biases or site.block is not None else outer
    return Tile(outer, min(inner, keys), tile.warps, tile.stages)


def forward(site: Site, lists: Lists | None, into: Into) -> Tensor:
    """As `triton.attention.forward`, for a site that it `takes`."""
    made = results(site.q)

    def prepared(found: dict[str, Any]) -> Prepared:
        tile = _tile("hopper forward", site)
        layout = site.layout("forward", tile, **forward_layout(into))
        found |= forward_arguments(into)
        found |= {"q": _descriptor(site.q, ROWS), "out": _descriptor(into.out, ROWS)}
        found |= {name: _descriptor(found[name], tile.inner) for name in "kv"}
        batch, heads, queries, _ = site.q.shape
        size = (site.k[0, 0].numel() + site.v[0, 0].numel()) * site.k.element_size()
        tiles = -(-queries // tile.outer)
        found |= _chunks(site, batch * heads, tiles, max(1, size * site.k.shape[1] // heads), _FORWARD)
        programs = min(tiles * batch * heads, detect(site.q.device).multiprocessors)
        text, names = hopper_source(site.spec, layout), hopper_parameters(site.spec, layout)
        return Prepared("kp_attention_hopper", text, names, programs, tile.warps)

    _launch(forward_kind(into), site, lists, into.tensors(), made, prepared)
    return made["lse"]


def forward_kind(into: Into) -> tuple[str, bool]:
    """What a launch depends on beside its tensors."""
    return "forward", into.unfinished


def results(q: Tensor) -> dict[str, Tensor]:
    """What is made for a forward kernel: lse, and how many items are taken."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return {"lse": lse, "taken": torch.zeros(1, dtype=torch.int32, device=q.device)}  # beside the first ones


class Prepared(NamedTuple):
    """A launch: what its sizes decide, beside its arguments."""

    function: str
    text: str
    names: tuple[str, ...]
    programs: int
    warps: int


_launches = Launches()


def _key(
    kind: Any, spec: AttentionSpec, block: tuple[int, int] | None, scalars: Sequence[int],
    tensors: dict[str, Tensor],
) -> tuple[Any, ...]:  # fmt: skip
    """What decides about a launch, by which it is kept and found."""
    return kind, spec, block, tuple(scalars), tensors["q"].device, alike(tensors)


def again(
    kind: Any, spec: AttentionSpec, block: tuple[int, int] | None, scalars: Sequence[int],
    tensors: dict[str, Tensor], make: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor] | None:  # fmt: skip
    """Launch a kernel as the last time with arguments alike, and with what is made for it, if there was one:
    what decided that it was launched is the same then, and need not be asked again."""
    q = tensors["q"]
    launch = _launches.find(_key(kind, spec, block, scalars, tensors))
    if launch is None or any(x.device != q.device for x in tensors.values()):
        return None
    made = make()
    with torch.cuda.device_of(q):
        launch(tensors | made)
    return made


def _launch(
    kind: Any, site: Site, lists: Lists | None, tensors: dict[str, Tensor], made: dict[str, Tensor],
    prepared: Callable[[dict[str, Any]], Prepared],
) -> None:  # fmt: skip
    """Launch a kernel as the last time with arguments alike, else as `prepared` says, which adds what it
    knows to the arguments. What is `made` for it is alike where the others are."""
    listed = lists.arguments() if lists is not None else {}
    tensors |= site.tensors() | {name: x for name, x in listed.items() if isinstance(x, Tensor)}
    if not site.tiles and again(kind, site.spec, site.block, site.scalars, tensors, lambda: made) is not None:
        return
    found = site.arguments() | listed | tensors | made
    given = prepared(found)
    grid, arguments = (given.programs,), {name: found[name] for name in given.names}
    kernel = run(site, given.function, given.text, given.names, found, grid, given.warps)
    if not site.tiles:
        key = _key(kind, site.spec, site.block, site.scalars, tensors)
        _launches.keep(key, kernel, grid, arguments)


def _chunks(site: Site, pairs: int, tiles: int, size: int, cached: int) -> dict[str, int]:
    """How heads, or groups of heads, go in chunks of much the same number, so that what programs read of a
    chunk, `size` bytes a pair, stays in the second-level cache; and so that a chunk has a tile for every
    multiprocessor at least, as the first tiles of the last one may take longest."""
    least = -(-detect(site.q.device).multiprocessors // tiles)
    chunks = -(-pairs // max(1, least, cached // size))
    return {"PAIRS": pairs, "CHUNK": -(-pairs // chunks)}


def gradients(
    site: Site, lists: Lists | None, grad: Tensor, lse: Tensor, delta: Tensor, total: Tensor,
    dq: Tensor | None, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dq [B,H,S,D], dk and dv [B,K,T,D]; `lists` are those of blocks of keys. dq is added up in
    `total`, zeros in float32 with dq's strides, in an order that varies. Without dq all three are added to
    what is there: dq, without the scale, to `total`, dk and dv in float32."""
    apart = lists is not None and dq is not None and _long_columns(site, lists)
    found = [dk, dv]
    if apart:
        batch, heads, _, _ = site.q.shape
        sizes = ((batch, x.shape[2], heads, x.shape[3]) for x in found)
        found = [dk.new_empty(size, dtype=torch.float32).transpose(1, 2) for size in sizes]
    _gradients(site, lists, grad, lse, delta, total, *found, adds=dq is None, apart=apart)
    if apart:
        for x, out in zip(found, (dk, dv), strict=True):
            out.copy_(x.unflatten(1, (site.k.shape[1], -1)).sum(2))
    if dq is not None:
        scaled(total, site.spec.scale, dq)


def _long_columns(site: Site, lists: Lists) -> bool:
    """Whether one program that goes through all heads of a group would have half as much to do as there is
    for a multiprocessor, where all queries choose its keys: `sink_blocks` are such. A tenth of the blocks of
    32k tokens, 32 heads for 8 of keys: 8.8 ms so, 6.4 ms with a program for each head (H100, 2026-11-27),
    more where these add to one result by atomic operations."""
    heads, kv_heads = site.q.shape[1], site.k.shape[1]
    if site.block is None or heads == kv_heads or lists.count.shape[1] == 1:  # one list for all, of a mask
        return False
    rows = -(-site.q.shape[2] // site.block[0])
    each = lists.blocks.numel() // (lists.count.shape[0] * lists.count.shape[1]) * site.q.shape[0] * heads
    return 2 * (heads // kv_heads) * rows > each // detect(site.q.device).multiprocessors


def _gradients(
    site: Site, lists: Lists | None, grad: Tensor, lse: Tensor, delta: Tensor, total: Tensor,
    dk: Tensor, dv: Tensor, *, adds: bool, apart: bool,
) -> None:  # fmt: skip
    tile = _tile("hopper backward", site)
    batch, heads = site.k.shape[0], (site.q if apart else site.k).shape[1]
    tiles = -(-site.k.shape[2] // tile.outer)
    size = site.q[0].numel() // heads * 8  # q, dout, and dq in float32
    chunks = _chunks(site, batch * heads, tiles, size, _BACKWARD)
    tensors = {"lse": lse, "delta": delta, "dk": dk, "dv": dv, "dq": total, "dout": grad}
    if lists is not None and site.block is not None:
        visits = lists.count.repeat_interleave(site.block[1] // tile.outer, 2)[:, :, :tiles]
        visits = visits.expand(batch, site.q.shape[1], -1)
        tensors["order"] = _longest_first(visits, heads, chunks["CHUNK"])

    def prepared(found: dict[str, Any]) -> Prepared:
        layout = site.layout("dkdv", tile, adds=adds, apart=apart)
        found |= chunks | strided("dk", dk) | strided("dv", dv)
        found |= {"q": _descriptor(site.q, tile.inner), "dout": _descriptor(grad, tile.inner)}
        found |= {name: _descriptor(found[name], ROWS) for name in "kv"}
        found["dq"] = _descriptor(total, *dq_part(layout))
        text, names = backward_source(site.spec, layout), backward_parameters(site.spec, layout)
        programs = tiles * batch * heads
        return Prepared("kp_attention_hopper_backward", text, names, programs, tile.warps)

    _launch(("backward", adds, apart), site, lists, tensors, {}, prepared)


def _longest_first(visits: Tensor, heads: int, chunk: int) -> Tensor:
    """Pairs of batch and head, or group of heads, with tiles of keys, as pair · tiles + tile, in the order
    that they are begun: `chunk` pairs after the other, in each first the tiles that visit most. Where all
    queries choose some keys, a long line that starts late is what everything waits for. `visits`
    [B,H,tiles]."""
    of_heads = visits.unflatten(1, (heads, -1)).sum(2).flatten(0, 1)
    turn = torch.arange(len(of_heads), device=visits.device)[:, None] // chunk
    return (of_heads - (turn << 32)).flatten().argsort(descending=True, stable=True).int()


def _descriptor(x: Tensor, rows: int, columns: int | None = None) -> Any:
    """Of tiles [1,1,rows,columns], all columns where none are named; what lies outside is read as zeros and
    not written."""
    block = (1, 1, rows, columns or padded(x.shape[3]))
    return TensorDescriptor.from_tensor(x, list(block), _shared_layout(block, x.dtype))


@lru_cache(maxsize=1024)
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
