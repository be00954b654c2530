"""What the kernel of a fused cast repeats: pointwise operations in front of the cast, back to its leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kp_compiler.lowering.fp8.quantize import is_cast

aten, prims = torch.ops.aten, torch.ops.prims

# Operations a kernel may repeat, as Triton expressions of float32 values.
EXPRESSIONS: dict[Any, str] = {
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
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def absorbed_nodes(graph: Graph) -> set[Node]:
    """Pointwise nodes that a cast, a scale or another such node uses: and nothing else, or they are cheap."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not node.users or not _repeatable(node):
            continue
        uses = [is_cast(user) or user in found for user in node.users]
        if all(uses) or (any(uses) and _is_cheap(node)):
            found.add(node)
    return found


def _is_cheap(node: Node) -> bool:
    """Made of one matrix that is no larger, and of vectors: a kernel may as well read that, and Inductor then
    writes the result only where other uses want it in memory."""
    if node.target in VIEWS:
        return True
    value = value_of(node)
    tensors = [value_of(n) for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]
    large = [t for t in tensors if equal(t.numel(), value.numel())]
    return len(large) == 1 and large[0].element_size() <= value.element_size()


def _repeatable(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.element_size() < 2:
        return False  # kernels compute in float32: a rounding to FP8 would not be done
    if node.target not in VIEWS and not all(_broadcasts(value_of(n), value) for n in node.all_input_nodes):
        return False
    if node.target is prims.convert_element_type.default or node.target in VIEWS:
        source = value_of(node.args[0])
        return source.is_floating_point() and (node.target not in VIEWS or _merges_rows(source, value))
    if node.target is aten.expand.default:
        return True
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] in (2, 3)
    return node.target in EXPRESSIONS and not node.kwargs


def _broadcasts(part: Any, whole: torch.Tensor) -> bool:
    """`part` is as large as `whole`, or has one number for each row of it, or for each column, or is one."""
    if not isinstance(part, torch.Tensor) or part.dim() > whole.dim():
        return False
    sizes = [1] * (whole.dim() - part.dim()) + list(part.shape)
    return all(map(equal, sizes[:-1], whole.shape[:-1])) or all(equal(size, 1) for size in sizes[:-1])


def equal(one: Any, other: Any) -> bool:
    return bool(statically_known_true(one == other))


def _merges_rows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """A view that only splits or merges the leading dimensions."""
    return before.dim() > 0 and after.dim() > 0 and bool(before.shape[-1] == after.shape[-1])


def leaves_of(node: Node, absorbed: set[Node]) -> list[Node]:
    """The tensors that a kernel for `node` reads."""
    found: dict[Node, None] = {}
    queue, seen = [node], {node}
    while queue:
        each = queue.pop()
        sources = each.all_input_nodes if each in absorbed else []
        if each not in absorbed and isinstance(value_of(each), torch.Tensor):  # sizes are no leaves
            found[each] = None
        queue += [source for source in sources if source not in seen]
        seen.update(sources)
    return list(found)


def value_of(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value
