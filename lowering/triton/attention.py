"""Launches of the attention kernels: q, k, v [B,H,S,D] of any strides, kernels written for a spec.

Reads q once and, for every tile of queries, the keys and values that its mask leaves; writes out and lse. The
backward pass reads them twice, once for each of its two kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.into import Into
from kp_compiler.lowering.triton.attention_source import parameters, source
from kp_compiler.lowering.triton.attention_writer import Layout, pieces
from kp_compiler.lowering.triton.text import compiled
from kp_compiler.specs import AttentionSpec
from kp_compiler.target import detect

_LARGEST_STRIDE = 2**23  # of a row, so that places in a tile of 128 rows are int32


@dataclass(frozen=True)
class Tile:
    """Sizes of a kernel's tiles and its launch settings."""

    outer: int
    inner: int
    warps: int
    stages: int

    def fitted(
        self, kernel: str, widths: tuple[int, int], itemsize: int, pair: int, limit: int,
        block: tuple[int, int] | None,
    ) -> Tile:  # fmt: skip
        """The same or smaller: its tiles, of rows as wide as those of q and k, and of v and out, and of
        `pair` bytes for each pair, within `limit` bytes of shared memory, and not larger than the blocks of
        lists."""
        outer, inner, stages = self.outer, self.inner, self.stages
        if block is not None:
            rows = reversed(block) if kernel == "dkdv" else block
            outer, inner = map(min, (outer, inner), rows)
        # of rows of the outer index; forward, those of q alone
        owned = widths[0] if kernel == "forward" else sum(widths)

        def bytes_of(outer: int, inner: int, stages: int) -> int:
            rows = itemsize * (outer * owned + stages * inner * sum(widths))
            return rows + stages * outer * inner * pair + 2048

        while bytes_of(outer, inner, stages) > limit and (stages, inner, outer) != (1, 16, 16):
            if stages > 1:
                stages -= 1
            elif inner >= outer and inner > 16:
                inner //= 2
            else:
                outer //= 2
        return Tile(outer, inner, max(1, self.warps * outer // self.outer), stages)


def tile_for(kernel: str, head_dim: int, itemsize: int) -> Tile:
    """What a kernel runs with: of half precision what `tiles.json` beside this has for the next larger head
    size, written by `benchmarks/attention_tiles.py --ship`."""
    if itemsize == 4:
        return Tile(32, 32, 8, 1) if head_dim > 128 else Tile(64, 64, 8, 1)
    sizes = _tiles()[kernel]
    return Tile(*sizes[min((size for size in sizes if size >= head_dim), default=max(sizes))])


def tiles_file() -> Traversable:
    return files(__package__).joinpath("tiles.json")


@cache
def _tiles() -> dict[str, dict[int, list[int]]]:
    """By kernel and head size."""
    found = json.loads(tiles_file().read_text())["tiles"]
    return {kernel: {int(size): tile for size, tile in sizes.items()} for kernel, sizes in found.items()}


@dataclass(frozen=True)
class Site:
    """Everything that all kernels of a site read."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    operands: Sequence[Tensor]
    scalars: Sequence[int]
    seed: Tensor | None = None
    block: tuple[int, int] | None = None  # queries and keys of a block of lists
    tiles: dict[str, Tile] = field(default_factory=dict)  # by kernel, in place of `tile_for`'s

    def tile(self, kernel: str) -> Tile:
        head, value = (sum(width for _, width in pieces(x.shape[3])) for x in (self.q, self.v))
        size = self.q.element_size()
        tile = self.tiles.get(kernel) or tile_for(kernel, max(head, value), size)
        streamed = [self.operands[bias.operand] for bias in self.spec.biases]
        streamed += self.mask_tensors() if self.spec.mask.kind == "tensor" else []
        pair = sum(x.element_size() for x in streamed)
        return tile.fitted(kernel, (head, value), size, pair, detect(self.q.device).shared_memory, self.block)

    def tensors(self) -> dict[str, Tensor]:
        """By parameter name."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        found |= {f"t{i}": x for i, x in enumerate(self.mask_tensors())}
        for i, bias in enumerate(self.spec.biases):
            found[f"bias{i}"] = self._broadcast(self.operands[bias.operand])
        if self.spec.sink is not None:
            found["sink"] = self.operands[self.spec.sink].reshape(-1).expand(self.q.shape[1]).contiguous()
        if self.seed is not None:
            found["seed"] = self.seed
        return found

    def arguments(self) -> dict[str, Any]:
        """By parameter name: tensors, their strides, sizes and numbers."""
        q, k = self.q, self.k
        found: dict[str, Any] = {f"n{i}": n for i, n in enumerate(self.scalars)}
        found |= {"H": q.shape[1], "GROUP": q.shape[1] // k.shape[1], "S": q.shape[2], "T": k.shape[2]}
        for name, x in self.tensors().items():
            if name in ("sink", "seed"):
                found[name] = x
            else:
                found |= strided(name, x, "bhs" if name in ("q", "k", "v") else range(x.dim()))
        return found

    def mask_tensors(self) -> list[Tensor]:
        tensors = [self.operands[index] for index in self.spec.mask.tensors]
        return [self._broadcast(t) for t in tensors] if self.spec.mask.kind == "tensor" else tensors

    def _broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])

    def layout(self, kernel: str, tile: Tile, **more: Any) -> Layout:
        outer, inner = ("k", "q") if kernel == "dkdv" else ("q", "k")
        sizes = {"q": self.q.shape[2], "k": self.k.shape[2]}
        spans = {outer: tile.outer, inner: tile.inner}
        if self.block is not None and kernel != "dbias":  # all of a block is visited
            spans[inner] = self.block["qk".index(inner)]
        tensors = self.mask_tensors()
        return Layout(
            self.q.shape[3], self.v.shape[3], (tile.outer, tile.inner), tile.stages,
            tuple(t.dtype == torch.bool for t in tensors), tuple(t.dim() for t in tensors),
            frozenset(name for name, size in sizes.items() if size % spans[name] == 0), self.block,
            exact=self.q.dtype == torch.float32, **more,
        )  # fmt: skip


def readable(x: Tensor) -> Tensor:
    """`x` with rows that are dense and not too far apart for the kernels, itself if it is."""
    return x if x.stride(-1) == 1 and x.stride(-2) < _LARGEST_STRIDE else x.contiguous()


def strided(name: str, x: Tensor, dims: Iterable[Any] = "bhs") -> dict[str, Any]:
    """A tensor and its strides, by parameter name."""
    return {name: x, **{f"{name}_{dim}": stride for dim, stride in zip(dims, x.stride(), strict=False)}}


def forward(site: Site, lists: Lists | None, into: Into) -> Tensor:
    """Write the result [B,H,S,E]; returns the log-sum-exp [B,H,S] in float32, −∞ for rows without a key."""
    lse = torch.empty(site.q.shape[:3], dtype=torch.float32, device=site.q.device)
    _launch("forward", site, lists, {"lse": lse} | forward_arguments(into), **forward_layout(into))
    return lse


def forward_arguments(into: Into) -> dict[str, Any]:
    """Of a forward kernel, by parameter name: its result, and what it starts from."""
    found: dict[str, Any] = {}
    for name, x in into.tensors().items():
        found |= {name: x} if name == "start_lse" else strided(name, x)
    return found


def forward_layout(into: Into) -> dict[str, Any]:
    started = into.start is not None
    return {"start": started, "continues": into.continues, "unfinished": into.unfinished}


def query_gradient(
    site: Site, lists: Lists | None, grad: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, adds: bool = False
) -> None:
    """Write dq [B,H,S,D]; `lists` are those of blocks of queries. `adds`: to dq in float32, without the
    scale."""
    found = {"lse": lse, "delta": delta, **strided("dout", grad), **strided("dq", dq)}
    _launch("dq", site, lists, found, adds=adds)


def key_gradients(
    site: Site, lists: Lists | None, grad: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    adds: bool = False,
) -> None:  # fmt: skip
    """Write dk [B,K,T,D] and dv [B,K,T,E]; `lists` are those of blocks of keys. `adds`: to them, in
    float32."""
    found = {"lse": lse, "delta": delta, **strided("dout", grad), **strided("dk", dk), **strided("dv", dv)}
    _launch("dkdv", site, lists, found, adds=adds)


def bias_gradient(
    site: Site, lists: Lists | None, index: int, grad: Tensor, lse: Tensor, delta: Tensor
) -> Tensor:
    """The gradient of bias `index` without its coefficient, in float32 and its shape."""
    bias = site.operands[site.spec.biases[index].operand]
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    sizes = (*site.q.shape[:3], site.k.shape[2])
    if 0 in sizes:
        return torch.zeros(bias.shape, dtype=torch.float32, device=grad.device)
    tile = site.tile("dbias")
    summed = frozenset(name for name, dim in (("q", 2), ("k", 3)) if shape[dim] == 1 < sizes[dim])
    tiles = -(-sizes[2] // tile.outer), -(-sizes[3] // tile.inner)
    rows, columns = (tiles[i] if name in summed else sizes[2 + i] for i, name in enumerate("qk"))
    out = torch.empty(shape[0], shape[1], rows, columns, dtype=torch.float32, device=grad.device)
    found = {"lse": lse, "delta": delta, **strided("dout", grad), **strided("dbias", out, "bhqk")}
    found |= {"batches": sizes[0] // shape[0], "heads": sizes[1] // shape[1], "own_heads": shape[1]}
    if lists is not None and site.block is not None:
        others = -(-sizes[3] // site.block[1])
        found |= {"visited": lists.visited(others), "list_length": others}
    grid = (tiles[0] * tiles[1] * shape[0] * shape[1],)
    _launch("dbias", site, lists, found, grid=grid, bias=index, summed=summed)
    for dim, name in ((2, "q"), (3, "k")):
        out = out.sum(dim, keepdim=True) if name in summed else out
    return out.reshape(bias.shape)


def scaled(x: Tensor, scale: float, out: Tensor) -> None:
    """out = x · scale in out's dtype: two dense tensors of the same sizes and strides."""
    with torch.cuda.device_of(x):
        _scaled[(triton.cdiv(x.numel(), 4096),)](x, out, scale, x.numel(), BLOCK=4096, num_warps=8)


@triton.jit(do_not_specialize=["scale"])
def _scaled(x, out, scale, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count)
    tl.store(out + place, (value * scale).to(out.dtype.element_ty), mask=place < count)


def delta_of(grad: Tensor, out: Tensor, grad_lse: Tensor | None, zeroed: Tensor | None = None) -> Tensor:
    """rowsum(grad ∘ out) - grad_lse, [B,H,S] in float32. On the way `zeroed` [B,H,S,D] is filled with
    zeros."""
    batch, heads, rows, width = out.shape
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    if delta.numel() == 0:
        return delta
    given = delta if grad_lse is None else grad_lse.contiguous()
    filled, columns = (out, 0) if zeroed is None else (zeroed, zeroed.shape[3])
    _delta[(triton.cdiv(rows, 64) * batch * heads,)](
        **strided("grad", grad), **strided("out", out), **strided("zeroed", filled), lse_ptr=given,
        delta=delta, H=heads, S=rows, E=width, D=columns, WIDTH=triton.next_power_of_2(width),
        GIVEN=grad_lse is not None, ZEROED=triton.next_power_of_2(columns) if columns else 0,
    )  # fmt: skip
    return delta


@triton.jit
def _delta(
    grad, out, zeroed, lse_ptr, delta, grad_b, grad_h, grad_s, out_b, out_h, out_s, zeroed_b, zeroed_h,
    zeroed_s, H, S, E, D, WIDTH: tl.constexpr, GIVEN: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    tiles = (S + 63) // 64
    batch, head = tl.program_id(0) // tiles // H, tl.program_id(0) // tiles % H
    rows = (tl.program_id(0) % tiles * 64 + tl.arange(0, 64)).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    mask = (rows[:, None] < S) & (columns < E)
    grad += batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h
    out += batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    mine = tl.load(grad + rows[:, None] * grad_s + columns, mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(out + rows[:, None] * out_s + columns, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(mine * theirs, 1)
    at = (batch * H + head).to(tl.int64) * S + rows
    if GIVEN:
        total -= tl.load(lse_ptr + at, mask=rows < S, other=0.0)
    tl.store(delta + at, total, mask=rows < S)
    if ZEROED > 0:
        zeroed += batch.to(tl.int64) * zeroed_b + head.to(tl.int64) * zeroed_h
        columns = tl.arange(0, ZEROED)[None, :]
        inside = (rows[:, None] < S) & (columns < D)
        tl.store(zeroed + rows[:, None] * zeroed_s + columns, tl.zeros([64, ZEROED], tl.float32), mask=inside)


def _launch(
    kernel: str,
    site: Site,
    lists: Lists | None,
    more: dict[str, Any],
    *,
    grid: tuple[int, ...] | None = None,
    **settings: Any,
) -> None:
    tile = site.tile(kernel)
    found = site.arguments() | more | (lists.arguments() if lists is not None else {})
    tiles = _descriptors(_STREAMED[kernel], found, tile)
    layout = site.layout(kernel, tile, described=frozenset(tiles), **settings)
    found |= tiles
    if grid is None:
        lines, heads = (
            (site.k.shape[2], site.k.shape[1]) if kernel == "dkdv" else (site.q.shape[2], site.q.shape[1])
        )
        grid = (-(-lines // tile.outer) * site.q.shape[0] * heads,)
    if 0 in grid:
        return
    text, names = source(kernel, site.spec, layout), parameters(kernel, site.spec, layout)
    run(site, f"kp_attention_{kernel}", text, names, found, grid, tile.warps)


def run(
    site: Site, function: str, text: str, names: Iterable[str], found: dict[str, Any],
    grid: tuple[int, ...], warps: int,
) -> Any:  # fmt: skip
    """Launch a kernel of a module's text on the site's device, with those of `found` that it names. Returns
    it as it was compiled."""
    with torch.cuda.device_of(site.q):
        return compiled(function, text)[grid](**{name: found[name] for name in names}, num_warps=warps)


# The matrices whose tiles a loop goes through
_STREAMED = {"forward": ("k", "v"), "dq": ("k", "v"), "dkdv": ("q", "dout"), "dbias": ()}


def _descriptors(names: Sequence[str], found: dict[str, Any], tile: Tile) -> dict[str, TensorDescriptor]:
    """Descriptors in place of pointers, where the device has an accelerator for copies of tiles: no addresses
    in registers, no instructions of every thread. All or none."""
    tensors = [found[name] for name in names]
    if not all(described(x) and len(pieces(x.shape[3])) == 1 for x in tensors):
        return {}
    if tensors and tensors[0].is_cuda and detect(tensors[0].device).sm < 90:
        return {}
    blocks = [[1, 1, tile.inner, pieces(x.shape[3])[0][1]] for x in tensors]
    made = (TensorDescriptor.from_tensor(x, block) for x, block in zip(tensors, blocks, strict=True))
    return dict(zip(names, made, strict=True))


def described(x: Tensor) -> bool:
    """Whether a descriptor can describe it: sizes, strides and addresses in multiples of 16 bytes."""
    unit = 16 // x.element_size()
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.shape[-1] % unit == 0
    return x.numel() > 0 and dense and all(stride > 0 and stride % unit == 0 for stride in x.stride()[:-1])
