"""Tensors that kp adds to a graph's inputs, and who provides them when the graph is called.

A pass that needs something kept between calls (weights already in FP8, the scales of delayed scaling) writes
stand-ins into Dynamo's graph, whose own inputs must stay as they are. In the copy that is lowered they are
placeholders. Compiled code sees ordinary inputs: nothing hides behind an operator, and CUDA graphs and caches
stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from kp_compiler.metadata import copied

_KEY = "kp_providers"


class Provider(Protocol):
    """Makes some added inputs, in order, from the arguments of a call."""

    def tensors(self, args: Sequence[Any]) -> Sequence[torch.Tensor]: ...


def provided_input(provider: int, index: int) -> torch.Tensor:
    """The stand-in: the `index`-th tensor of a provider."""
    raise RuntimeError("kp: a graph with added inputs was run without being lowered")


def add_inputs(
    gm: GraphModule,
    provider: Provider,
    values: Sequence[torch.Tensor],
    before: Node,
    staying: Sequence[bool],
) -> list[Node]:
    """Stand-ins for `provider`'s tensors in front of a node; `values` are fake. Tensors that are `staying`
    where they are from call to call need not be copied into a CUDA graph's own memory; where one moves all
    the same, Inductor records again."""
    if _KEY not in gm.meta:  # Dynamo's optimizer for DDP gives one dictionary to all parts of a graph
        gm.meta = {**gm.meta, _KEY: []}
    known = gm.meta[_KEY]
    if provider not in known:
        known.append(provider)
    number = known.index(provider)
    earlier = gm.graph.find_nodes(op="call_function", target=provided_input)
    start = sum(node.args[0] == number for node in earlier)
    nodes = []
    for index, (value, stays) in enumerate(zip(values, staying, strict=True), start):
        with gm.graph.inserting_before(before):
            node = gm.graph.call_function(provided_input, (number, index))
        node.meta["example_value"] = value
        node.meta["kp_stays"] = stays
        nodes.append(node)
    return nodes


def providers(gm: GraphModule) -> list[Provider]:
    found: list[Provider] = gm.meta.get(_KEY, [])
    return found


def forget(gm: GraphModule) -> None:
    """The passes that added inputs were undone."""
    gm.meta.pop(_KEY, None)


def extended(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """The graph with placeholders for what was added, and example inputs to go with it (fake ones)."""
    if not providers(gm):
        return gm, list(example_inputs)
    graph = copied(gm.graph)
    inputs = list(example_inputs)
    last = graph.find_nodes(op="placeholder")[-1]
    for node in _stand_ins(graph):
        with graph.inserting_after(last):
            last = graph.placeholder(f"kp_input_{node.args[0]}_{node.args[1]}")
        last.meta["example_value"] = node.meta["example_value"]
        if node.meta["kp_stays"]:
            # as torch._dynamo.mark_static_address does
            last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        last._dynamo_source = None  # AOTAutograd asks every placeholder; no user code names this one
        node.replace_all_uses_with(last, propagate_meta=False)
        graph.erase_node(node)
        inputs.append(last.meta["example_value"])
    whole = GraphModule(gm, graph)
    whole.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        whole._param_name_to_source = gm._param_name_to_source
    return whole, inputs


def _stand_ins(graph: Graph) -> list[Node]:
    """In the order of the inputs they become."""
    found = graph.find_nodes(op="call_function", target=provided_input)
    return sorted(found, key=lambda node: node.args)


def provided(compiled: Callable[..., Any], gm: GraphModule) -> Callable[..., Any]:
    """A callable that takes what Dynamo passes and adds the rest: what providers have, or the stand-ins'
    values where Dynamo's optimizer for DDP runs it on fake tensors, to see the layouts of its results."""
    found = tuple(providers(gm))
    if not found:
        return compiled
    fakes = [node.meta["example_value"] for node in _stand_ins(gm.graph)]

    def call(*args: Any) -> Any:
        if isinstance(next((arg for arg in args if isinstance(arg, torch.Tensor)), None), FakeTensor):
            return compiled(*args, *fakes)
        return compiled(*args, *(tensor for each in found for tensor in each.tensors(args)))

    return call


def position(node: Node) -> int:
    """Which argument of its graph a placeholder is."""
    return node.graph.find_nodes(op="placeholder").index(node)
