"""Write `kp::fp8_fused` for a group of casts: their expressions, stores and buffers as a `Program`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.fp8.fused import fp8_fused
from kp_compiler.lowering.fp8.program import Buffer, Kind, Launch, Layout, Program, Store, tile_for
from kp_compiler.lowering.fp8.quantize import ALIGNMENT, alignment
from kp_compiler.lowering.fp8.recipes import BLOCK
from kp_compiler.lowering.fp8.repeat import EXPRESSIONS, VIEWS, value_of
from kp_compiler.lowering.fp8.write_out import Writer

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass
class Cast:
    """All casts of one matrix with one scale, into one dtype."""

    parts: tuple[Node, ...]
    dim: int
    scale: Node
    dtype: torch.dtype
    block: tuple[int, int]
    plain: list[Node] = field(default_factory=list)
    turned: list[Node] = field(default_factory=list)
    amax: list[Node] = field(default_factory=list)
    by_rows: bool = False  # a kernel of whole rows makes their scales

    def nodes(self) -> list[Node]:
        return [*self.plain, *self.turned, *self.amax, *self.made()]

    def made(self) -> list[Node]:
        """The scale, where the kernel makes it: that of blocks of the same matrix."""
        if self.scale.target is not torch.ops.kp.fp8_scale.default:
            return []
        parts, dim, dtype, block = self.scale.args[:4]
        same = (tuple(parts), dim, dtype, tuple(block)) == (self.parts, self.dim, self.dtype, self.block)  # type: ignore[arg-type]
        return [self.scale] if same and (self.by_rows or max(self.block) > 1) else []

    def inverses(self) -> list[Node]:
        """Where the kernel makes the scale and everything else reads its inverse: those nodes."""
        others = [n for n in self.scale.users if n not in self.plain and n not in self.turned]
        found = [n for n in others if n.target is aten.reciprocal.default]
        kp = torch.ops.kp
        waits = kp.fp8_quantize.default, kp.fp8_scale.default
        waiting = [n for n in others if n.target in waits and n.args[-1] is self.scale]
        return found if self.made() and len(found) + len(waiting) == len(others) else []


class _Builder:
    """Collects tensors and launches of one operator."""

    def __init__(self, graph: Graph, anchor: Node, absorbed: set[Node]) -> None:
        self.absorbed = absorbed
        self.writer = Writer(graph, anchor)
        self.tensors: list[Node] = []
        self.buffers: list[Buffer] = []
        self.results: list[list[Node]] = []  # for each buffer, the nodes it stands for
        self.maxima: dict[int, tuple[Cast, _Launches]] = {}  # buffers of one number a tile

    def tensor(self, node: Node) -> int:
        if node not in self.tensors:
            self.tensors.append(node)
        return self.tensors.index(node)

    def buffer(
        self,
        nodes: list[Node],
        layout: Layout,
        rows: int,
        columns: int,
        *,
        tile: tuple[int, int] = (1, 1),
        align: int = 1,
    ) -> int:
        if not nodes:
            return -1
        dtype = str(value_of(nodes[0]).dtype).removeprefix("torch.")
        self.buffers.append(Buffer(dtype, rows, columns, layout, tile, align))
        self.results.append(nodes)
        return len(self.buffers) - 1


class _Launches:
    """The expressions of one launch."""

    def __init__(self, builder: _Builder, rows: Any, columns: int) -> None:
        self.builder, self.rows, self.columns = builder, rows, columns
        self.leaves: list[tuple[int, Kind]] = []
        self.code: list[str] = []
        self.names: dict[Any, str] = {}
        self.stores: list[Store] = []

    def finished(self) -> Launch:
        leaves = tuple(self.leaves)
        stores = tuple(self.stores)
        return Launch(leaves, tuple(self.code), stores, tile_for(leaves, stores, self.columns), self.columns)

    def read(self, node: Node, kind: Kind) -> int:
        leaf = (self.builder.tensor(node), kind)
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        return self.leaves.index(leaf)

    def expression(self, node: Any) -> str:
        """The name of a node's value at (m, k)."""
        if not isinstance(node, Node):
            return repr(float(node)) if math.isfinite(node) else f"float('{float(node)}')"
        if node in self.names:
            return self.names[node]
        if node not in self.builder.absorbed:
            name = f"x{self.read(*self._leaf(node))}"
        elif node.target in (*VIEWS, prims.convert_element_type.default, aten.expand.default):
            name = self.expression(node.args[0])
        else:
            if node.target is aten.pow.Tensor_Scalar:
                base = self.expression(node.args[0])
                text = " * ".join([base] * int(node.args[1]))  # type: ignore[call-overload]
            else:
                text = EXPRESSIONS[node.target].format(*map(self.expression, node.args))
            name = f"v{len(self.code)}"
            self.code.append(f"{name} = {text}")
        self.names[node] = name
        return name

    def _leaf(self, node: Node) -> tuple[Node, Kind]:
        """A tensor as the kernel reads it: a matrix, a vector along rows or columns, a number."""
        value = value_of(node)
        writer = self.builder.writer
        if (
            value.dim() >= 2
            and statically_known_true(value.numel() == self.rows * self.columns)
            and value.shape[-1] != 1
        ):
            return (node if value.dim() == 2 else writer.view(node, [-1, self.columns])), "full"
        if all(size == 1 for size in value.shape):
            return node, "scalar"
        if value.dim() == 1 or all(size == 1 for size in value.shape[:-1]):
            return (node if value.dim() == 1 else writer.view(node, [self.columns])), "column"
        return writer.view(node, [-1]), "row"


def emit(graph: Graph, group: list[Cast], absorbed: set[Node]) -> None:
    builder = _Builder(graph, max(node for cast in group for node in cast.nodes()), absorbed)
    launches: dict[Any, _Launches] = {}
    for cast in group:
        _add(cast, builder, launches)
    for index, (_, one) in builder.maxima.items():
        height, width, _ = one.finished().tile
        builder.buffers[index] = dataclasses.replace(builder.buffers[index], tile=(height, width))
    program = Program(
        tuple(one.finished() for one in launches.values()), tuple(builder.buffers), fingerprint()
    )
    outs = builder.writer.call(fp8_fused(), builder.tensors, program.to_json())
    found = [builder.writer.item(outs, index) for index in range(len(builder.results))]
    tiles: dict[int, list[Node]] = {}
    for index, (cast, _) in builder.maxima.items():
        tiles.setdefault(id(cast), []).append(found[index])
    largest = [(cast.amax, builder.writer.largest(tiles[id(cast)])) for cast in group if cast.amax]
    for index, nodes in enumerate(builder.results):
        if index not in builder.maxima:
            _replace(nodes, found[index])
    for nodes, out in largest:
        _replace(nodes, out)


def _replace(nodes: list[Node], out: Node) -> None:
    for node in nodes:
        node.replace_all_uses_with(out)
        node.graph.erase_node(node)


def _add(cast: Cast, builder: _Builder, launches: dict[Any, _Launches]) -> None:
    """The stores of one matrix; parts of equal width that start elsewhere share a launch where they can."""
    sizes = [value_of(part).shape for part in cast.parts]
    along_rows = cast.dim == 0 and len(cast.parts) > 1
    rows = sum(int(s[0]) for s in sizes) if along_rows else -1
    columns = int(sizes[0][1]) if cast.dim == 0 else sum(int(s[1]) for s in sizes)
    unit = ALIGNMENT if cast.block == (1, BLOCK) else 1
    plain = builder.buffer(cast.plain, "plain", rows, columns, align=unit)
    turned = builder.buffer(cast.turned, "turned", rows, columns, align=alignment(cast.block))
    unit = alignment(cast.block) if cast.block[0] > 1 else unit
    tile = (cast.block[0], cast.block[1] or columns)
    inverses = cast.inverses()
    made = [*inverses, *cast.made()]  # casts that only wait for the scale take its inverse for it
    scales = builder.buffer(made, "tiles", rows, columns, tile=tile, align=unit)
    place = 0
    for part, size in zip(cast.parts, sizes, strict=True):
        key = part if along_rows else int(size[1])
        one = launches.setdefault(key, _Launches(builder, size[0], int(size[1])))
        value = one.expression(part)
        offset = (place, 0) if along_rows else (0, place if cast.dim == 1 else 0)
        amax = builder.buffer(cast.amax, "tiles", int(size[0]) if along_rows else -1, int(size[1]))
        if amax >= 0:
            builder.maxima[amax] = (cast, one)
        if scales >= 0:
            power_of_two = bool(cast.scale.args[4])
            store = Store(
                value, -1, plain, turned, *offset, amax, cast.block, scales, bool(inverses), power_of_two
            )
        else:
            scale = _scale_leaf(cast, one, place, size[cast.dim])
            store = Store(value, scale, plain, turned, *offset, amax)
        one.stores.append(store)
        place += int(size[cast.dim]) if len(cast.parts) > 1 else 0


def _scale_leaf(cast: Cast, launch: _Launches, start: int, length: Any) -> int:
    """The scale of one part as a leaf: one number, or one for each row or column."""
    kind: Kind = "scalar" if cast.block == (0, 0) else "row" if cast.block[0] else "column"
    scale, writer = cast.scale, launch.builder.writer
    if kind != "scalar":
        scale = writer.view(scale, [-1])
        if len(cast.parts) > 1 and (kind == "column") == (cast.dim == 1):
            scale = writer.slice(scale, start, start + length)
    return launch.read(scale, kind)
