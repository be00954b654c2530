"""What a graph's mutations do to it, and erasing nodes without losing one.

Dynamo's graph is not functional. `Writes` knows every write per storage (fake tensors of views share theirs),
so that a reader can tell whether a value is still what its node computed, and can follow a value through
in-place updates. `erase_orphans` removes what a rewrite left without a user; a plain
`Graph.eliminate_dead_code` would delete mutations.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from kp_compiler.metadata import CHECKPOINT_OPS, number_of, tensor_of
from kp_compiler.normalize import INPLACE_OPERATORS, canonical, is_inplace_name


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    found: list[Any] = [node.kwargs.get("out")]
    if _asks_for_inplace(node):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if str(node.target) in CHECKPOINT_OPS:
        found += _written_in_body(node)
    if node.op == "call_method":
        if is_inplace_name(str(node.target)) or node.target == "__setitem__":
            found.append(node.args[0])
    elif isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        found += _written_by_schema(node)
    elif node.target is operator.setitem:
        found.append(node.args[0])
    else:
        name = getattr(node.target, "__name__", "")
        if name in INPLACE_OPERATORS or (
            name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_")
        ):
            found.append(node.args[0])
    return [arg for arg in _flat(found) if isinstance(arg, Node) and tensor_of(arg) is not None]


def _written_by_schema(node: Node) -> list[Any]:
    """Arguments that the schema of an operator, or one of its overloads, marks as written to."""
    target: Any = node.target
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    found = []
    for overload in overloads:
        formals = overload._schema.arguments
        given = [*zip(formals, node.args, strict=False)]
        given += [(formal, node.kwargs[formal.name]) for formal in formals if formal.name in node.kwargs]
        found += [arg for formal, arg in given if getattr(formal.alias_info, "is_write", False)]
    return found


def _flat(values: Any) -> Iterator[Any]:
    """Lists of tensors are written to as one (`torch._foreach_mul_`, `out=(values, indices)`)."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _asks_for_inplace(node: Node) -> bool:
    """`F.relu(x, inplace=True)`, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    index = _inplace_parameter(node.target) if node.op == "call_function" else None
    return index is not None and len(node.args) > index and node.args[index] is True


@cache
def _inplace_parameter(function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (TypeError, ValueError):  # a builtin, or no such parameter
        return None


def _written_in_body(call: Node) -> list[Any]:
    """Arguments that a checkpoint body writes to."""
    body = call.graph.owning_module.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]
    storages = {storage_of(target) for node in body.graph.nodes for target in written(node)} - {None}
    places = body.graph.find_nodes(op="placeholder")
    return [arg for place, arg in zip(places, call.args[1:], strict=False) if storage_of(place) in storages]


def storage_of(node: Any) -> int | None:
    """An identity for the storage behind a node's tensor: views share it."""
    value = tensor_of(node)
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)  # inside torch.func transforms
    try:
        return None if value is None else value.untyped_storage()._cdata
    except NotImplementedError:  # nested and other tensors without one
        return None


def constant(value: Any) -> float | None:
    """A Python number, or a 0-dimensional tensor that the graph makes from one."""
    if (number := number_of(value)) is not None:
        return number
    tensor = tensor_of(value)
    if tensor is None or tensor.numel() != 1 or not isinstance(value, Node):
        return None
    op, storage = canonical(value), storage_of(value)
    if op is None or op.inplace or tensor.dtype.is_complex:
        return None
    source = {"full": "fill_value", "full_like": "fill_value", "tensor": "data", "new_tensor": "data"}
    if op.name not in (*source, "cast", "clone", "view", "expand", "unsqueeze", "sqrt"):
        return None
    if any(storage_of(target) == storage for node in value.graph.nodes for target in written(node)):
        return None
    number = constant(op[source.get(op.name, "input")])
    if number is None or (op.name == "sqrt" and number < 0):
        return None
    return rounded(math.sqrt(number) if op.name == "sqrt" else number, tensor.dtype)


def rounded(number: float, dtype: torch.dtype) -> float | None:
    """A number as a tensor of `dtype` holds it; None where it holds none like it."""
    try:
        return float(torch.tensor(number, dtype=dtype))
    except (RuntimeError, OverflowError, ValueError):
        return None


class Writes:
    """Where a graph writes to which storage, by position. Build it anew after the graph was edited."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.by_storage: dict[int, list[Node]] = {}
        self.external = {storage_of(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
        for node in graph.nodes:
            for target in written(node):
                storage = storage_of(target)
                if storage is not None:
                    self.by_storage.setdefault(storage, []).append(node)

    def between(self, value: Node, reader: Node, *, since: Node | None = None) -> list[Node]:
        """Writes to `value`'s storage before `reader` runs and after `since` did (default: after it was
        computed)."""
        storage = storage_of(value)
        if storage is None or storage not in self.by_storage:
            return []
        low, high = self.position.get(since or value, -1), self.position.get(reader, len(self.position))
        return [node for node in self.by_storage[storage] if low < self.position[node] < high]

    def current(self, value: Node, reader: Node) -> Node | None:
        """The node that holds what `value` reads as at `reader`: itself, the in-place update of it, or None.

        An update is followed when it rewrites the whole of a tensor that was made inside the graph.
        """
        while writes := self.between(value, reader):
            first = writes[0]
            whole = written(first) == [value] and tensor_of(first) is not None
            if not whole or first.target is operator.setitem or storage_of(value) in self.external:
                return None
            value = first
        return value


# --------------------------------------------------------------------------------------------------------
# clean-up


def erase_orphans(
    graph: Graph, roots: list[Node], *, keep: Callable[[Node], bool] = lambda node: False
) -> int:
    """Erase `roots` and whatever only they used, walking up. Mutations go only with everything that shares
    their storage; nodes with other effects and placeholders stay. Returns the number of nodes erased."""
    erased = 0
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node._erased or node.users or node.op not in ("call_function", "call_method") or keep(node):
            continue
        if not _removable(node):
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        erased += 1
        queue.extend(inputs)
        queue.extend(user for i in inputs for user in i.users if not user.users and written(user) == [i])
    return erased


def _removable(node: Node) -> bool:
    targets = written(node)
    if targets:
        return all(_private(target, node) for target in targets)
    op = canonical(node)
    if op is not None:
        return op.name != "item" and not (
            op.name == "dropout" and op["p"] > 0.0 and not node.meta.get("kp_replaced")
        )
    if isinstance(node.target, torch._ops.OpOverload):
        return (
            not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
    return getattr(node.target, "__module__", "") in _PURE_MODULES and not node.is_impure()


_PURE_MODULES = (
    "kp_compiler.runtime",
    "_operator",
    "math",
    "torch.nn.functional",
    "torch._C._nn",
    "torch",
    "torch.functional",
)


def _private(target: Node, writer: Node) -> bool:
    """No one but `writer` still looks at the storage that `target` owns, and the graph made it."""
    storage = storage_of(target)
    for node in writer.graph.nodes:
        if storage_of(node) != storage:
            continue
        if node.op in ("placeholder", "get_attr"):
            return False
        if any(user is not writer for user in node.users):
            return False
    return True
