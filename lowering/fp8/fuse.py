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

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from kp_compiler.lowering.fp8.emit import Cast, emit
from kp_compiler.lowering.fp8.keep import base
from kp_compiler.lowering.fp8.program import MOST_COLUMNS
from kp_compiler.lowering.fp8.quantize import alignment
from kp_compiler.lowering.fp8.recipes import BLOCK
from kp_compiler.lowering.fp8.repeat import absorbed_nodes, equal, leaves_of, value_of
from kp_compiler.lowering.fp8.write_out import Writer

aten, prims = torch.ops.aten, torch.ops.prims

_PRODUCTS = (aten._scaled_mm.default, aten.mm.default, aten.addmm.default, aten.bmm.default)


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
    absorbed = absorbed_nodes(graph)  # fused operators read none: the set stays right as they are written
    for part in {part for node in (*casts, *scales) for part in node.args[0]}:  # type: ignore[union-attr]
        if not any(_is_whole(leaf, part) for leaf in leaves_of(part, absorbed)):
            absorbed.discard(part)  # a kernel goes over the tiles of some matrix that it reads
    for group in _groups(casts, amaxes, absorbed):
        emit(graph, group, absorbed)
    maxima: dict[Any, Node] = {}
    for node in (*scales, *casts):
        if not node._erased and not _has_blocks(node):  # one that is left without its cast stays an operator
            Writer(graph, node, maxima).write_out()
    _sort(graph)


def _is_whole(leaf: Node, part: Node) -> bool:
    """A leaf with as many numbers as the matrix that is made of it."""
    return equal(value_of(leaf).numel(), value_of(part).numel())


def _has_blocks(node: Node) -> bool:
    """A scale or cast of blocks."""
    return any(isinstance(arg, list | tuple) and BLOCK in arg for arg in node.args)


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
    wanted = [c for c in wanted if not c.turned or c.dim == 1 or len(c.parts) == 1 or _is_aligned(c)]
    _take_amax(wanted, amaxes)
    reads = {id(c): {leaf for part in c.parts for leaf in leaves_of(part, absorbed)} for c in wanted}
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


def _is_aligned(cast: Cast) -> bool:
    """Parts below one another that fill a transposed copy: a kernel pads one part only, and turns two rows at
    once."""
    rows = [value_of(part).shape[0] for part in cast.parts]
    return all(equal(r % 2, 0) for r in rows) and equal(sum(rows) % alignment(cast.block), 0)


def _by_rows(cast: Cast, absorbed: set[Node]) -> bool:
    """One scale a row and no transposed copy, of what is read from memory anyway: rows are then read once.
    Casts of what Inductor computes, as a norm, are made by the kernel that computes it."""
    if cast.block != (1, 0) or cast.turned or (len(cast.parts) > 1 and cast.dim == 1):
        return False
    leaves = {leaf for part in cast.parts for leaf in leaves_of(part, absorbed)}
    return value_of(cast.parts[0]).shape[-1] <= MOST_COLUMNS and all(map(_lies_in_memory, leaves))


def _lies_in_memory(node: Node) -> bool:
    """An input of the graph, or the result of a kernel that Inductor fuses nothing into."""
    source = base(node)
    if source.op == "placeholder" or source.target is operator.getitem:
        return True
    namespace = getattr(source.target, "namespace", "")
    return namespace == "kp" or source.target in _PRODUCTS


def _same_rows(one: Cast, other: Cast) -> bool:
    """Their parts are of one shape, and lie below one another in both or in none."""
    a, b = value_of(one.parts[0]), value_of(other.parts[0])
    joined = {cast.dim for cast in (one, other) if len(cast.parts) > 1}
    return len(joined) < 2 and a.dim() == b.dim() and all(map(equal, a.shape, b.shape))


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


def _sort(graph: Graph) -> None:
    """Every node after what it reads, otherwise as before."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
