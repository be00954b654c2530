"""What a compiled layer keeps for its backward pass, as passes over graphs of AOTAutograd.

`narrow` (forward graphs): a result that is a slice of a merged product would keep all of that product alive.

    mm ─▶ slice ─▶ output        to        mm ─▶ slice ─▶ clone ─▶ output

`store_products` (joint graphs, `save="fp8"`): what the backward pass computes from products of FP8 layers, it
computes from copies of them in FP8, one scale a row; half the bytes where pointwise operations stand between,
as behind the gate and up projections (the method of COAT, arXiv 2410.19313, with its scales for 128 elements
made coarser).

    forward  mm ─▶ f ─▶ …                    forward  mm ─▶ f ─▶ …      mm ─▶ cast ─▶ kept
    backward        f ─▶ g(tangent)          backward  kept ─▶ cast back ─▶ f ─▶ g(tangent)

The partitioner then keeps the smaller copy, and recomputes f.

`recompute_casts` (joint graphs): the partitioner takes a cast for an operation that needs its input in
memory, and keeps what norms and activations give. But `fuse` computes such an input again in the kernel that
casts it, from what the backward pass reads anyway.

    forward  x ─▶ norm ─▶ cast ─▶ mm         backward  x ─▶ norm ─▶ cast turned ─▶ mm
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from kp_compiler.lowering.fp8.quantize import E4M3, is_cast
from kp_compiler.lowering.fp8.recipes import ROW
from kp_compiler.lowering.fp8.repeat import VIEWS
from kp_compiler.lowering.fp8.write_out import Writer

aten, prims = torch.ops.aten, torch.ops.prims
_VIEWS = {
    *VIEWS, aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default,
    operator.getitem,
}  # fmt: skip
# What a rounding error passes through without growing. Comparisons are only those with a number: a maximum
# that is looked for again is not found among rounded values.
_SMOOTH = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.sub.Scalar,
    aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten.exp.default, aten.sigmoid.default,
    aten.tanh.default, aten.erf.default, aten.relu.default, aten.pow.Tensor_Scalar, aten.le.Scalar,
    aten.lt.Scalar, aten.ge.Scalar, aten.gt.Scalar, aten.where.self, prims.convert_element_type.default,
}  # fmt: skip
_RESHAPES = {*VIEWS, aten.expand.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}


def narrow(graph: Graph) -> None:
    """Copy what is kept of a product where that is less than all of it. What the caller gets stays as it is:
    it may count on results that share memory."""
    if not _has_backward(graph):
        return
    output = next(iter(graph.find_nodes(op="output")))
    results: Any = output.args[0]
    given = {n for n in results[: _results()] if isinstance(n, Node)}
    intact = {base(n) for n in given} | set(output.all_input_nodes)
    slices: dict[Node, list[Node]] = {}
    for node in dict.fromkeys(n for n in results if isinstance(n, Node) and n not in given):
        whole = base(node)
        if whole is not node and whole.op == "call_function" and isinstance(_value(whole), torch.Tensor):
            slices.setdefault(whole, []).append(node)
    for whole, nodes in slices.items():
        kept = sum(_value(node).numel() for node in nodes)
        if whole in intact or not _smaller(kept, _value(whole).numel()):
            continue
        for node in nodes:
            copy = Writer(graph, output).call(aten.clone.default, node)
            output.replace_input_with(node, copy)


def _has_backward(graph: Graph) -> bool:
    """A forward graph as AOTAutograd names its inputs."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    return any(n.startswith("primals") for n in names) and not any(n.startswith("tangents") for n in names)


def _results() -> int:
    """How many of a forward graph's results are the caller's; the rest is kept."""
    context = torch._guards.TracingContext.try_get()
    assert context is not None and context.fw_metadata is not None
    return int(context.fw_metadata.num_forward)


def base(node: Node) -> Node:
    """What a tensor is a view or a part of."""
    while node.target in _VIEWS or node.target in _SPLITS:
        source = node.args[0]
        if not isinstance(source, Node) or (node.target is operator.getitem and source.target not in _SPLITS):
            break
        node = source
    return node


def _smaller(part: Any, whole: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(part < whole))


def _value(node: Node) -> Any:
    return node.meta.get("val")


# ---------------------------------------------------------------------------------------------------------


def store_products(graph: Graph) -> None:
    """See the module docstring. Graphs without a backward pass stay as they are."""
    backward = _backward(graph)
    if not backward:
        return
    copies = _Copies(graph, backward)
    for node in [n for n in graph.nodes if n in backward and _reads_values(n)]:
        for source in list(node.all_input_nodes):
            if source not in backward and copies.depends(source) and not _divides(node, source):
                node.replace_input_with(source, copies.of(source))
    graph.eliminate_dead_code()
    graph.lint()


# ---------------------------------------------------------------------------------------------------------


def recompute_casts(graph: Graph) -> None:
    """Mark what a cast of the backward pass reads as to be computed again, up to what is kept anyway."""
    chains = _Chains(graph, _backward(graph))
    for node in graph.find_nodes(op="call_function", target=torch.ops.kp.fp8_quantize.default):
        if node not in chains.backward:
            continue
        for part in node.args[0]:  # type: ignore[union-attr]
            chains.mark(part)


class _Chains:
    """Pointwise operations in front of casts."""

    def __init__(self, graph: Graph, backward: set[Node]) -> None:
        self.backward = backward
        self.kept: dict[Node, bool] = {}
        self.stale = _stale(graph)

    def mark(self, part: Node) -> None:
        """Where all of what `part` is made of is kept anyway, `part` need not be. To the partitioner the mark
        is a constraint: what carries it is computed again, whatever that takes."""
        while part.target in _RESHAPES:
            part = part.args[0]  # type: ignore[assignment]
        found: set[Node] = set()
        if self._is_pointwise(part) and not self._is_kept(part) and self._collect(part, found):
            for node in found:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE

    def _collect(self, node: Node, found: set[Node]) -> bool:
        """Whether `node` can be computed in the backward pass from vectors and kept tensors, by `found`."""
        found.add(node)
        return all(
            self._is_there(source) or (self._is_pointwise(source) and self._collect(source, found))
            for source in node.all_input_nodes
            if source not in found and isinstance(_value(source), torch.Tensor)
        )

    def _is_there(self, node: Node) -> bool:
        """The backward pass has it anyway, or it is small."""
        saved = node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
        if node in self.stale:
            return saved
        return saved or _is_vector(_value(node)) or self._is_kept(node)

    def _is_pointwise(self, node: Node) -> bool:
        simple = node.target in _SMOOTH or node.target in (aten.rsqrt.default, *_RESHAPES)
        return simple and node not in self.backward and "recompute" not in node.meta

    def _is_kept(self, node: Node) -> bool:
        """The backward pass reads it, or what is made of nothing else but vectors; casts don't count."""
        if node not in self.kept:
            self.kept[node] = False
            self.kept[node] = any(self._needs(user, node) for user in node.users)
        return self.kept[node]

    def _needs(self, user: Node, node: Node) -> bool:
        if user in self.backward:
            return not is_cast(user)
        others = [n for n in user.all_input_nodes if n is not node and isinstance(_value(n), torch.Tensor)]
        simple = self._is_pointwise(user) and all(_is_vector(_value(n)) for n in others)
        return simple and self._is_kept(user)


def _stale(graph: Graph) -> set[Node]:
    """Inputs that the graph writes to, at its end, and all that is made of them: computed again in the
    backward pass they would be others."""
    writes = graph.find_nodes(op="call_function", target=aten.copy_.default)
    return _made_of(graph, {base(node.args[0]) for node in writes})  # type: ignore[arg-type]


def _is_vector(value: torch.Tensor) -> bool:
    """One number for a column or for a row at most."""
    return _is_row(value) or (value.dim() > 1 and value.shape[-1] == 1)


# ---------------------------------------------------------------------------------------------------------


def _backward(graph: Graph) -> set[Node]:
    """Nodes that depend on a tangent."""
    inputs = graph.find_nodes(op="placeholder")
    return _made_of(graph, {node for node in inputs if "tangents" in str(node.target)})


def _made_of(graph: Graph, sources: set[Node]) -> set[Node]:
    """Those nodes, and all that depend on one of them."""
    found = set(sources)
    for node in graph.nodes:
        if node.op != "output" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _reads_values(node: Node) -> bool:
    """Smooth operations, and casts: what they read need not be what the forward pass had to the bit."""
    return node.target in _SMOOTH or is_cast(node)


def _divides(node: Node, source: Node) -> bool:
    """A division by a product's value, which may be rounded to zero; by a sum with 1, as in a sigmoid, it is
    harmless."""
    return (
        node.target is aten.div.Tensor
        and node.args[1] is source
        and source.target not in (aten.add.Tensor, aten.add.Scalar)
    )


def _is_product(node: Node) -> bool:
    kp = torch.ops.kp
    return node.target in (aten._scaled_mm.default, kp.fp8_mm.default)


class _Copies:
    """Forward values, computed again from products in FP8."""

    def __init__(self, graph: Graph, backward: set[Node]) -> None:
        self.graph, self.backward = graph, backward
        self.made: dict[Node, Node] = {}
        self.known: dict[Node, bool] = {}

    def depends(self, node: Node) -> bool:
        """A product's columns, or pointwise operations on such and on single rows (a sum along the residual
        stream would be repeated from all layers before it)."""
        if node not in self.known:
            self.known[node] = self._is_slice(node) or self._repeats(node)
        return self.known[node]

    def _is_slice(self, node: Node) -> bool:
        """A product [M,N], or some columns of one."""
        while not _is_product(node):
            if node.target not in (operator.getitem, aten.slice.Tensor, *_SPLITS):
                return False
            node = node.args[0]  # type: ignore[assignment]
            if not isinstance(node, Node):
                return False
        return True

    def _repeats(self, node: Node) -> bool:
        if node in self.backward or not (node.target in _SMOOTH or node.target is aten.view.default):
            return False
        if any(_divides(node, source) for source in node.all_input_nodes):
            return False
        tensors = [n for n in node.all_input_nodes if isinstance(_value(n), torch.Tensor)]
        large = [n for n in tensors if not _is_row(_value(n))]
        return bool(large) and all(self.depends(n) for n in large)

    def of(self, node: Node) -> Node:
        if node not in self.made:
            self.made[node] = self._stored(node) if self._is_slice(node) else self._again(node)
        return self.made[node]

    def _again(self, node: Node) -> Node:
        inputs = {n: self.of(n) for n in node.all_input_nodes if self.depends(n)}
        with self.graph.inserting_after(max([node, *inputs.values()])):
            copy = self.graph.node_copy(node, lambda n: inputs.get(n, n))
        return copy

    def _stored(self, node: Node) -> Node:
        """Cast and cast back."""
        write, kp = Writer(self.graph, node.next), torch.ops.kp
        scale = write.call(kp.fp8_scale.default, [node], 0, E4M3, list(ROW), False, None)
        stored = write.call(kp.fp8_quantize.default, [node], 0, scale, E4M3, list(ROW), False, None)
        wide = write.call(prims.convert_element_type.default, stored, torch.float32)
        back = write.call(aten.mul.Tensor, wide, write.call(aten.reciprocal.default, scale))
        return write.cast(back, _value(node).dtype)


def _is_row(value: torch.Tensor) -> bool:
    """One number for a column at most, as a bias."""
    return all(size == 1 for size in value.shape[:-1])
