"""Fuse casts after AOTAutograd: each distinct activation, gradient and weight is read once.

    f(a, b) ─▶ quantize ─┐                            a, b ─▶ kp.fp8_fused ─▶ row copy, transposed copy
    f(a, b) ─▶ quantize transposed ─┘

A cast that only wants the matrix as it lies is written out in ATen: Inductor fuses it into whatever
computes the matrix, the norm or the activation. A cast that wants it transposed becomes a kernel of kp's,
together with the plain cast of the same matrix and with the pointwise operations in front of them, and with
other casts that read the same tensors: gradients of gate and up projection and the product they came from are
one kernel. One scale a row, of what lies in memory, makes a kernel as well, which finds the scales on the
way. Other scales are written out in ATen, first along rows, so that the maximum is taken where the matrix is
made.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.fp8.fused import fp8_fused
from kp_compiler.lowering.fp8.keep import base
from kp_compiler.lowering.fp8.program import (
    MOST_COLUMNS,
    Buffer,
    Kind,
    Launch,
    Layout,
    Program,
    Store,
    tile_for,
)
from kp_compiler.lowering.fp8.quantize import ALIGNMENT, alignment
from kp_compiler.lowering.fp8.recipes import BLOCK
from kp_compiler.lowering.fp8.write_out import Writer

aten, prims = torch.ops.aten, torch.ops.prims

# Operations a kernel may repeat, as Triton expressions of float32 values.
_EXPRESSIONS: dict[Any, str] = {
    aten.add.Tensor: "({0} + {1})",
    aten.sub.Tensor: "({0} - {1})",
    aten.mul.Tensor: "({0} * {1})",
    aten.div.Tensor: "({0} / {1})",
    aten.add.Scalar: "({0} + {1})",
    aten.sub.Scalar: "({0} - {1})",
    aten.mul.Scalar: "({0} * {1})",
    aten.div.Scalar: "({0} / {1})",
    aten.neg.default: "(-{0})",
    aten.exp.default: "tl.exp({0})",
    aten.sigmoid.default: "(1.0 / (1.0 + tl.exp(-{0})))",
    aten.erf.default: "tl.erf({0})",
    aten.tanh.default: "(2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0)",
    aten.reciprocal.default: "(1.0 / {0})",
    aten.rsqrt.default: "(1.0 / tl.sqrt({0}))",
    aten.relu.default: "tl.where({0} < 0.0, 0.0, {0})",
}
_PRODUCTS = (aten._scaled_mm.default, aten.mm.default, aten.addmm.default, aten.bmm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def fuse_casts(graph: Graph) -> None:
    """Replace every operator of `quantize` in a post-grad graph."""
    casts = list(graph.find_nodes(op="call_function", target=torch.ops.kp.fp8_quantize.default))
    kp = torch.ops.kp
    scales = [
        node
        for target in (kp.fp8_scale.default, kp.fp8_amax.default)
        for node in graph.find_nodes(op="call_function", target=target)
    ]
    if not casts and not scales:
        return
    amaxes = [node for node in scales if node.target is kp.fp8_amax.default]
    absorbed = _absorbed(graph)  # fused operators read none of these: the set stays right as they are written
    for part in {part for node in (*casts, *scales) for part in node.args[0]}:  # type: ignore[union-attr]
        if not any(_is_whole(leaf, part) for leaf in _leaves(part, absorbed)):
            absorbed.discard(part)  # a kernel goes over the tiles of some matrix that it reads
    for group in _groups(casts, amaxes, absorbed):
        _emit(graph, group, absorbed)
    maxima: dict[Any, Node] = {}
    for node in (*scales, *casts):
        if not node._erased and not _has_blocks(node):  # one that is left without its cast stays an operator
            Writer(graph, node, maxima).write_out()
    _sort(graph)


def _is_whole(leaf: Node, part: Node) -> bool:
    """A leaf with as many numbers as the matrix that is made of it."""
    return _equal(_value(leaf).numel(), _value(part).numel())


def _has_blocks(node: Node) -> bool:
    """A scale or cast of blocks."""
    return any(isinstance(arg, list | tuple) and BLOCK in arg for arg in node.args)


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
        mine = (list(self.parts), self.dim, self.dtype, list(self.block))
        args = self.scale.args
        if (
            not (self.by_rows or max(self.block) > 1)
            or self.scale.target is not torch.ops.kp.fp8_scale.default
        ):
            return []
        return [self.scale] if (list(args[0]), args[1], args[2], list(args[3])) == mine else []  # type: ignore[call-overload]


def _casts(nodes: list[Node]) -> list[Cast]:
    found: dict[Any, Cast] = {}
    for node in nodes:
        parts, dim, scale, dtype, block, transpose, _ = node.args
        key = (tuple(parts), dim, scale, dtype, tuple(block))  # type: ignore[arg-type]
        cast = found.setdefault(key, Cast(*key))
        (cast.turned if transpose else cast.plain).append(node)
    return list(found.values())


def _take_amax(casts: list[Cast], amaxes: list[Node]) -> None:
    """The largest magnitude of a matrix is found where it is cast, unless the cast needs it."""
    for cast in casts:
        same = [node for node in amaxes if (tuple(node.args[0]), node.args[1]) == (cast.parts, cast.dim)]
        if not cast.made():
            same = [node for node in same if not _reaches([cast.scale], {node})]
        cast.amax += same
        amaxes = [node for node in amaxes if node not in same]


def _groups(nodes: list[Node], amaxes: list[Node], absorbed: set[Node]) -> Iterator[list[Cast]]:
    """Casts that become one operator: those that want a transposed copy or join several matrices, put
    together where they read a tensor in common and nothing lies between them."""
    casts = _casts(nodes)
    for cast in casts:
        cast.by_rows = _by_rows(cast, absorbed)
    wanted = [c for c in casts if c.turned or len(c.parts) > 1 or max(c.block) > 1 or c.by_rows]
    wanted = [c for c in wanted if not c.turned or c.dim == 1 or all(_is_even(p) for p in c.parts[:-1])]
    _take_amax(wanted, amaxes)
    reads = {id(c): {leaf for part in c.parts for leaf in _leaves(part, absorbed)} for c in wanted}
    rest = wanted
    while rest:
        group, rest = [rest[0]], rest[1:]
        for other in list(rest):
            shared = any(reads[id(other)] & reads[id(mine)] for mine in group)
            alike = all(mine.by_rows == other.by_rows and _same_rows(mine, other) for mine in group)
            if shared and alike and _independent([*group, other]):
                group.append(other)
                rest.remove(other)
        yield group


def _is_even(part: Node) -> bool:
    """Two rows of one tensor are turned together."""
    return _equal(_value(part).shape[0] % 2, 0)


def _by_rows(cast: Cast, absorbed: set[Node]) -> bool:
    """One scale a row and no transposed copy, of what is read from memory anyway: rows are then read once.
    Casts of what Inductor computes, as a norm, are made by the kernel that computes it."""
    if cast.block != (1, 0) or cast.turned or (len(cast.parts) > 1 and cast.dim == 1):
        return False
    leaves = {leaf for part in cast.parts for leaf in _leaves(part, absorbed)}
    return _value(cast.parts[0]).shape[-1] <= MOST_COLUMNS and all(map(_lies_in_memory, leaves))


def _lies_in_memory(node: Node) -> bool:
    """An input of the graph, or the result of a kernel that Inductor fuses nothing into."""
    source = base(node)
    if source.op == "placeholder" or source.target is operator.getitem:
        return True
    namespace = getattr(source.target, "namespace", "")
    return namespace == "kp" or source.target in _PRODUCTS


def _same_rows(one: Cast, other: Cast) -> bool:
    """Their parts are of one shape, and lie below one another in both or in none."""
    a, b = _value(one.parts[0]), _value(other.parts[0])
    joined = {cast.dim for cast in (one, other) if len(cast.parts) > 1}
    return len(joined) < 2 and a.dim() == b.dim() and all(map(_equal, a.shape, b.shape))


def _independent(group: list[Cast]) -> bool:
    """No member needs what another one makes, be it through an operator that was written before."""
    made = {node for cast in group for node in cast.nodes()}
    return not _reaches([n for c in group for n in (*c.parts, *([] if c.made() else [c.scale]))], made)


def _reaches(nodes: list[Node], made: set[Node]) -> bool:
    """Some of `nodes` is one of `made`, or needs one."""
    queue, seen = list(nodes), set[Node]()
    while queue:
        node = queue.pop()
        if node in made:
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False


# ---------------------------------------------------------------------------------------------------------
# what a kernel repeats


def _absorbed(graph: Graph) -> set[Node]:
    """Pointwise nodes that a cast, a scale or another such node uses: and nothing else, or they are cheap."""
    kp = torch.ops.kp
    sinks = {kp.fp8_quantize.default, kp.fp8_scale.default, kp.fp8_amax.default}
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not node.users or not _repeatable(node):
            continue
        uses = [user.target in sinks or user in found for user in node.users]
        if all(uses) or (any(uses) and _is_cheap(node)):
            found.add(node)
    return found


def _is_cheap(node: Node) -> bool:
    """Made of one matrix that is no larger, and of vectors: a kernel may as well read that, and Inductor then
    writes the result only where other uses want it in memory."""
    if node.target in _VIEWS:
        return True
    value = _value(node)
    tensors = [_value(n) for n in node.all_input_nodes if isinstance(_value(n), torch.Tensor)]
    large = [t for t in tensors if _equal(t.numel(), value.numel())]
    return len(large) == 1 and large[0].element_size() <= value.element_size()


def _repeatable(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if node.target not in _VIEWS and not all(_broadcasts(_value(n), value) for n in node.all_input_nodes):
        return False
    if node.target is prims.convert_element_type.default or node.target in _VIEWS:
        source = _value(node.args[0])
        return source.is_floating_point() and (node.target not in _VIEWS or _merges_rows(source, value))
    if node.target is aten.expand.default:
        return True
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] in (2, 3)
    return node.target in _EXPRESSIONS and not node.kwargs


def _broadcasts(part: Any, whole: torch.Tensor) -> bool:
    """`part` is as large as `whole`, or has one number for each row of it, or for each column, or is one."""
    if not isinstance(part, torch.Tensor) or part.dim() > whole.dim():
        return False
    sizes = [1] * (whole.dim() - part.dim()) + list(part.shape)
    return all(map(_equal, sizes[:-1], whole.shape[:-1])) or all(_equal(size, 1) for size in sizes[:-1])


def _equal(one: Any, other: Any) -> bool:
    return bool(statically_known_true(one == other))


def _merges_rows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """A view that only splits or merges the leading dimensions."""
    return before.dim() > 0 and after.dim() > 0 and bool(before.shape[-1] == after.shape[-1])


def _leaves(node: Node, absorbed: set[Node]) -> list[Node]:
    """The tensors that a kernel for `node` reads."""
    found: dict[Node, None] = {}
    queue, seen = [node], {node}
    while queue:
        each = queue.pop()
        sources = each.all_input_nodes if each in absorbed else []
        if each not in absorbed and isinstance(_value(each), torch.Tensor):  # sizes are no leaves
            found[each] = None
        queue += [source for source in sources if source not in seen]
        seen.update(sources)
    return list(found)


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


# ---------------------------------------------------------------------------------------------------------
# writing the operator


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
        dtype = str(_value(nodes[0]).dtype).removeprefix("torch.")
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
        elif node.target in (*_VIEWS, prims.convert_element_type.default, aten.expand.default):
            name = self.expression(node.args[0])
        else:
            if node.target is aten.pow.Tensor_Scalar:
                base = self.expression(node.args[0])
                text = " * ".join([base] * int(node.args[1]))  # type: ignore[call-overload]
            else:
                text = _EXPRESSIONS[node.target].format(*map(self.expression, node.args))
            name = f"v{len(self.code)}"
            self.code.append(f"{name} = {text}")
        self.names[node] = name
        return name

    def _leaf(self, node: Node) -> tuple[Node, Kind]:
        """A tensor as the kernel reads it: a matrix, a vector along rows or columns, a number."""
        value = _value(node)
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


def _emit(graph: Graph, group: list[Cast], absorbed: set[Node]) -> None:
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
    sizes = [_value(part).shape for part in cast.parts]
    along_rows = cast.dim == 0 and len(cast.parts) > 1
    rows = sum(int(s[0]) for s in sizes) if along_rows else -1
    columns = int(sizes[0][1]) if cast.dim == 0 else sum(int(s[1]) for s in sizes)
    unit = ALIGNMENT if cast.block == (1, BLOCK) else 1
    plain = builder.buffer(cast.plain, "plain", rows, columns, align=unit)
    turned = builder.buffer(cast.turned, "turned", rows, columns, align=alignment(cast.block))
    unit = alignment(cast.block) if cast.block[0] > 1 else unit
    tile = (cast.block[0], cast.block[1] or columns)
    scales = builder.buffer(cast.made(), "tiles", rows, columns, tile=tile, align=unit)
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
            store = Store(value, -1, plain, turned, *offset, amax, cast.block, scales, power_of_two)
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


def _sort(graph: Graph) -> None:
    """Every node after what it reads, otherwise as before."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
