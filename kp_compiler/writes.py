"""What a graph's mutations do to it, and erasing nodes without losing one.

Dynamo's graph is not functional. `Writes` knows every write per storage (fake tensors of views share theirs),
so that a reader can tell whether a value is still what its node computed, and can follow a value through
in-place updates. `erase_orphans` removes what a rewrite left without a user; a plain
`Graph.eliminate_dead_code` would delete mutations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from kp_compiler.metadata import number_of, tensor_of
from kp_compiler.normalize import INPLACE_OPERATORS, canonical, is_inplace_name


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    found: list[Any] = []
    if node.kwargs.get("inplace") is True or "out" in node.kwargs:
        found.append(node.kwargs.get("out", node.args[0] if node.args else None))
    if node.op == "call_method":
        if is_inplace_name(str(node.target)) or node.target == "__setitem__":
            found.append(node.args[0])
    elif isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        pairs = zip(schema.arguments, node.args, strict=False)
        found += [
            arg for formal, arg in pairs if formal.alias_info is not None and formal.alias_info.is_write
        ]
        by_name = {f.name for f in schema.arguments if f.alias_info is not None and f.alias_info.is_write}
        found += [arg for name, arg in node.kwargs.items() if name in by_name]
    elif node.target is operator.setitem:
        found.append(node.args[0])
    else:
        name = getattr(node.target, "__name__", "")
        if name in INPLACE_OPERATORS or (
            name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_")
        ):
            found.append(node.args[0])
        elif node.target is F.dropout and len(node.args) > 3 and node.args[3] is True:
            found.append(node.args[0])
    return [arg for arg in found if isinstance(arg, Node) and tensor_of(arg) is not None]


def storage_of(node: Any) -> int | None:
    """An identity for the storage behind a node's tensor: views share it."""
    value = tensor_of(node)
    try:
        return None if value is None else value.untyped_storage()._cdata
    except NotImplementedError:  # wrappers inside functorch transforms own no storage
        return None


def constant(value: Any) -> float | None:
    """A Python number, or a 0-dimensional tensor that the graph makes from one."""
    if (number := number_of(value)) is not None:
        return number
    tensor = tensor_of(value)
    if tensor is None or tensor.numel() != 1 or not isinstance(value, Node):
        return None
    op = canonical(value)
    if op is None or op.inplace or any(value in written(user) for user in value.users):
        return None
    if op.name == "cast" and op["dtype"] is not None and not op["dtype"].is_floating_point:
        return None
    if op.name in ("cast", "clone", "view", "expand", "unsqueeze"):
        return constant(op["input"])
    if op.name in ("full", "full_like"):
        return constant(op["fill_value"])
    if op.name in ("tensor", "new_tensor"):
        return constant(op["data"])
    if op.name == "sqrt" and (number := constant(op["input"])) is not None and number >= 0:
        return math.sqrt(number)
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


_PURE_MODULES = ("_operator", "math", "torch.nn.functional", "torch._C._nn", "torch", "torch.functional")


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
