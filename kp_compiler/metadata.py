"""What Dynamo knows of a graph's nodes: their fake values, those of new nodes, the bodies inside a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node


def value_of(node: Any) -> Any:
    """The fake value Dynamo computed for a node (or the constant itself)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def stride_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the widest stride to the narrowest; sizes seen by this compilation decide."""
    hints = [hint(stride) for stride in value.stride()]
    return sorted(range(value.dim()), key=lambda dim: (-hints[dim], dim))


def hint(size: Any) -> int:
    """The size that this compilation saw; no guard is added. For choices that are right for any size."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def number_of(value: Any) -> float | None:
    """A Python number, or the value of a float that Dynamo made symbolic, unless it is an argument.

    Under `dynamic=True` attributes such as `self.scaling` are symbolic. Reading one here makes Dynamo guard
    on it, so another value compiles anew. A float argument may change with every call and is left symbolic.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    from torch._dynamo.source import LocalSource  # not at import time

    found = value_of(value)
    if not isinstance(value, Node) or not isinstance(found, float | torch.SymFloat):
        return None
    if isinstance(found, float):
        return found
    holder = value.args[0] if value.op == "call_method" and value.target == "item" else value
    argument = holder.meta.get("grapharg") if isinstance(holder, Node) else None
    if argument is None or isinstance(argument.source, LocalSource):
        return None
    return float(found)


def fill_metadata(gm: GraphModule) -> list[str]:
    """Compute missing `example_value`s under the graph's own fake mode; returns the names that stay without
    one."""
    from torch._guards import detect_fake_mode

    missing = [
        n
        for n in gm.graph.nodes
        if n.op in ("call_function", "call_method") and "example_value" not in n.meta
    ]
    if not missing:
        return []
    mode = detect_fake_mode([v for n in gm.graph.nodes if (v := tensor_of(n)) is not None])
    return [node.name for node in missing if mode is None or not infer(node, mode)]


def infer(node: Node, mode: Any) -> bool:
    """Like `trace_fake`, for a node that may be one that fakes can't run: sites that need its value are
    refused."""
    try:
        trace_fake(node, mode)
    except Exception:
        return False
    return True


def trace_fake(node: Node, mode: Any, *, grad: bool = True) -> None:
    """Run one node on its arguments' fake values and keep the result.

    The Python dispatcher decomposes composites such as matmul; their C++ form would turn symbolic sizes into
    numbers.
    """
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    with mode, torch.set_grad_enabled(grad), enable_python_dispatcher():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]


def copied(graph: Graph) -> Graph:
    """A copy of Dynamo's graph with its output and metadata."""
    copy = Graph(owning_module=graph.owning_module)
    copy_nodes(graph, copy)
    copy._codegen = graph._codegen
    return copy


def copy_nodes(graph: Graph, into: Graph) -> None:
    """All nodes, the output too, with their metadata, behind those that `into` has."""
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        mapping[node] = into.node_copy(node, mapping.__getitem__)
        if hasattr(node, "_dynamo_source"):  # AOTAutograd asks placeholders for it
            mapping[node]._dynamo_source = node._dynamo_source


def bodies(gm: GraphModule) -> Iterator[tuple[GraphModule, tuple[Node, ...]]]:
    """The graph and every activation-checkpoint body under it, each with the nodes that call it."""
    yield gm, ()
    calls: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if (
            node.op == "call_function"
            and str(node.target) in CHECKPOINT_OPS
            and isinstance(node.args[0], Node)
        ):
            calls.setdefault(str(node.args[0].target), []).append(node)
    for name, nodes in calls.items():
        body = gm.get_submodule(name)
        if isinstance(body, GraphModule):
            yield body, tuple(nodes)


CHECKPOINT_OPS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
