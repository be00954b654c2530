"""Contracts of kp's operators: schema and meaning. Torch only; kernels are imported when first used.

`kp::attention` and `kp::linear` are the operators that recognisers produce and passes work on. They are
composite: run as they stand, they compute the reference. Lowering replaces them before AOTAutograd sees the
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node

from kp_compiler.specs import AttentionSpec, LinearSpec

_LINEAR = "(Tensor x, Tensor weight, Tensor? bias, str spec) -> Tensor"
_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars, str spec) -> Tensor"


@cache
def _library() -> Any:
    from kp_compiler.lowering.reference import attention as reference

    library = torch.library.Library("kp", "DEF")
    library.define(f"attention{_SCHEMA}")
    library.define(f"reference_attention{_SCHEMA}")
    for name in ("attention", "reference_attention"):
        library.impl(name, reference, "CompositeImplicitAutograd")
    library.define(f"linear{_LINEAR}")
    library.impl("linear", _plain_linear, "CompositeImplicitAutograd")
    return library


def fragment(
    name: str,
    schema: str,
    kernels: dict[str, Callable[..., Any]],
    fake: Callable[..., Any] | None = None,
    *,
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Define `kp::name` with a kernel for each dispatch key. It lives as long as what is returned."""
    made = torch.library.Library("kp", "FRAGMENT")
    made.define(f"{name}{schema}", tags=tags)
    for key, kernel in kernels.items():
        made.impl(name, kernel, key)
    if fake is not None:
        torch.library.register_fake(f"kp::{name}", fake, lib=made)
    return made


def _plain_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: str
) -> torch.Tensor:
    transposed = LinearSpec.from_json(spec).transposed
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)


def attention() -> Any:
    """`kp::attention`: q [B,H,S,D], k [B,K,T,D], v [B,K,T,E], operands and scalars as `spec` (JSON) numbers
    them; returns [B,H,S,E] in q's dtype."""
    _library()
    return torch.ops.kp.attention.default


def reference_attention() -> Any:
    """The same computation under the name that survives lowering: the reference kernel."""
    _library()
    return torch.ops.kp.reference_attention.default


def linear() -> Any:
    """`kp::linear`: x [..., K], weight [N,K] ([K,N] where the spec says transposed), bias [N] or None;
    returns [..., N]."""
    _library()
    return torch.ops.kp.linear.default


def is_linear(node: Node) -> bool:
    return node.op == "call_function" and node.target is linear()


def is_raised(node: Node) -> bool:
    """One of the operators that recognisers produce, which never reach AOTAutograd."""
    return is_attention(node) or is_linear(node)


def is_attention(node: Node) -> bool:
    return node.op == "call_function" and node.target is attention()


def attentions(graph: Graph) -> list[Node]:
    """The `kp.attention` nodes of a graph, in its order."""
    return [node for node in graph.nodes if is_attention(node)]


@lru_cache(maxsize=4096)
def parse_spec(text: str) -> AttentionSpec:
    return AttentionSpec.from_json(text)


def spec_of(node: Node) -> AttentionSpec:
    """The spec of a `kp.attention` node."""
    return parse_spec(str(node.args[5]))


def import_node(node: Any, site: Node, calls: tuple[Node, ...]) -> Any:
    """`node` as usable in `site`'s graph: a node of the graph around a checkpoint body becomes one more
    argument."""
    if not isinstance(node, Node) or node.graph is site.graph:
        return node
    graph = site.graph
    for placeholder in graph.find_nodes(op="placeholder"):
        if placeholder.meta.get("kp_outer") is node:
            return placeholder
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        placeholder = graph.placeholder(f"kp_{node.name}")
    placeholder.meta["example_value"] = node.meta.get("example_value")
    placeholder.meta["kp_outer"] = node
    for call in calls:
        call.args = (*call.args, node)
    return placeholder
