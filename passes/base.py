"""What a pass is, and the tools every pass edits graphs with.

A pass names its candidate sites, inspects each without touching the graph, and rewrites the ones that match.
The runner (`kp_compiler.pipeline`) does the rest: flags, timing, records, undoing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.config import Config, PassConfig
from kp_compiler.lowering import ops
from kp_compiler.metadata import bodies, tensor_of, trace_fake, value_of
from kp_compiler.report import Rejection
from kp_compiler.target import Target
from kp_compiler.writes import Writes, erase_orphans

Tier = Literal["exact", "approximate", "distributed"]
Kind = Literal["attention", "linear"]


@dataclass
class Context:
    """What a pass may look at besides the graph."""

    gm: GraphModule  # the graph at work: the whole one, or a checkpoint body
    config: Config
    target: Target
    calls: tuple[Node, ...] = ()  # the nodes that call this body, empty at the top
    assumed_dtype: torch.dtype | None = None  # what `plan` was told parameters will be
    program: dict[Any, Any] = field(default_factory=dict)  # of a pass run, for a graph and its bodies
    cache: dict[Any, Any] = field(default_factory=dict)  # per graph and pass run
    writes: Writes = field(init=False)
    outer_writes: Writes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.writes = Writes(self.gm.graph)
        if self.calls:
            self.outer_writes = Writes(self.calls[0].graph)


@dataclass(frozen=True)
class Match:
    """A site that can be rewritten. `data` is the pass's own; the strings go into the record."""

    site: Node
    data: Any
    impl: str | None = None
    spec: str | None = None
    shape: str = ""
    predicted: dict[str, Any] | None = None
    notes: tuple[Rejection, ...] = ()


class Pass(Protocol):
    """See the module docstring; `name` is also the flag."""

    name: str
    tier: Tier
    kind: Kind
    final: bool  # a record of this pass settles the site
    serves: tuple[str, ...]  # passes that work on its result: it runs where one of them is on; empty: always

    def applies(self, ctx: Context) -> Rejection | None:
        """Why the pass can do nothing for a whole graph, asked once per graph."""

    def sites(self, graph: Graph) -> Iterable[Node]:
        """Every candidate, also those that will be refused."""

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        """Decide; edits nothing."""

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        """Edit; returns the node that now stands for the site."""


def not_on_cpu(ctx: Context) -> Rejection | None:
    """What a pass that chooses kernels says of CPU graphs."""
    if ctx.target.device == "cpu" and not ctx.target.reference and not ctx.target.assumed:
        return Rejection(
            "cpu", "CPU graphs are not rewritten.", "options={'cpu_rewrites': True} does it anyway."
        )
    return None


def settings(ctx: Context, name: str) -> PassConfig:
    return getattr(ctx.config, name)


def left_out(settings: PassConfig, site: Node) -> bool:
    """The user's `skip` and `only` leave the site's module out."""
    module = module_of(site)
    skipped = any(part in module for part in settings.skip)
    return skipped or (bool(settings.only) and not any(part in module for part in settings.only))


class Emitter:
    """Writes nodes in front of `anchor`, with metadata, as part of the site `origin`."""

    def __init__(self, anchor: Node, origin: Node) -> None:
        self.graph = anchor.graph
        self.anchor = anchor
        self.origin = origin
        self.mode = fake_mode(self.graph)
        self.made: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A `call_function` node (methods hide from AOTAutograd's cache)."""
        return self._add(target, args, kwargs, grad=True)

    def call_without_grad(self, target: Callable[..., Any], *args: Any) -> Node:
        """The same for a higher-order operator whose autograd traces its sub-graphs under another fake
        mode."""
        return self._add(target, args, {}, grad=False)

    def attention(self, *args: Any) -> Node:
        """A `kp.attention` node. Its value is known without running the reference: q's sizes, v's width."""
        q, v = tensor_of(args[0]), tensor_of(args[2])
        assert q is not None and v is not None
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(ops.attention(), args)
        copy_provenance(self.origin, node)
        with self.mode:
            value = q.new_empty([*q.shape[:3], v.shape[3]])
        node.meta["example_value"] = value.requires_grad_(any(_has_grad(arg) for arg in node.all_input_nodes))
        self.made.append(node)
        return node

    def linear(self, x: Node, weight: Node, bias: Node | None, spec: str) -> Node:
        """A `kp.linear` node. Its value is the origin's."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(ops.linear(), (x, weight, bias, spec))
        copy_provenance(self.origin, node)
        node.meta["example_value"] = self.origin.meta["example_value"]
        self.made.append(node)
        return node

    def _add(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, grad: bool
    ) -> Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        copy_provenance(self.origin, node)
        trace_fake(node, self.mode, grad=grad)
        self.made.append(node)
        return node

    def size(self, node: Node, dim: int) -> Any:
        """One size of a tensor: an int where it is static, else a node."""
        tensor = tensor_of(node)
        assert tensor is not None
        size = tensor.shape[dim]
        return (
            size
            if isinstance(size, int)
            else self.call(torch.ops.aten.sym_size.int, node, dim % tensor.dim())
        )

    def product(self, sizes: Iterable[Any]) -> Any:
        """The product of sizes: an int where all are static, else a node."""
        total: Any = 1
        for size in sizes:
            if isinstance(total, int) and isinstance(size, int):
                total *= size
            else:
                total = (
                    size if isinstance(total, int) and total == 1 else self.call(operator.mul, total, size)
                )
        return total

    def reshape(self, node: Node, sizes: list[Any]) -> Node:
        """`torch.reshape`, left out where the shape is already right."""
        tensor = tensor_of(node)
        assert tensor is not None
        wanted = [value_of(size) for size in sizes]
        if len(wanted) == tensor.dim() and all(same(a, b) for a, b in zip(wanted, tensor.shape, strict=True)):
            return node
        return self.call(torch.ops.aten.reshape.default, node, sizes)

    def permute(self, node: Node, order: list[int]) -> Node:
        return node if order == sorted(order) else self.call(torch.ops.aten.permute.default, node, order)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        tensor = tensor_of(node)
        assert tensor is not None
        return node if tensor.dtype == dtype else self.call(torch.ops.aten.to.dtype, node, dtype)


def _has_grad(node: Node) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.requires_grad


def grad_switches(graph: Graph) -> list[Node]:
    """Where a graph enters or leaves `torch.no_grad`."""
    return list(graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled))


def loses_gradient(node: Node, reader: Node) -> bool:
    """The node was computed without gradients from something that has one, and `reader` has them on again:
    reading its input in its place would give it one. (Dynamo's fake views claim a gradient all the same.)"""
    switches = grad_switches(node.graph)
    if not switches or not any(map(_has_grad, node.all_input_nodes)):
        return False
    return _grad_is_off(node, switches) and not _grad_is_off(reader, switches)


def _grad_is_off(node: Node, switches: list[Node]) -> bool:
    before = [switch for switch in switches if switch < node]
    return bool(before) and before[-1].args[0] is False


def revert(site: Node) -> None:
    """Put the original nodes of a recognised site back."""
    root, out = site.meta["kp_root"], site.meta["kp_out"]
    out.replace_all_uses_with(root, delete_user_cb=lambda user: user is not root, propagate_meta=False)
    root.meta.pop("kp_replaced", None)
    erase_orphans(site.graph, [out, site])


def settle(site: Node, out: Node) -> None:
    """`out` takes the place of a recognised site and of what it was recognised in."""
    root, arguments = site.meta["kp_root"], site.all_input_nodes
    site.replace_all_uses_with(out, propagate_meta=False)
    site.graph.erase_node(site)
    erase_orphans(root.graph, [root, *arguments])


def fake_mode(graph: Graph) -> Any:
    """The fake mode of a graph's tensors."""
    for node in graph.nodes:
        tensor = tensor_of(node)
        if tensor is not None and getattr(tensor, "fake_mode", None) is not None:
            return tensor.fake_mode
    raise RuntimeError("the graph holds no fake tensor")


def copy_provenance(source: Node, node: Node) -> None:
    """Module path and source line, as reports and user errors show them."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def same(a: Any, b: Any) -> bool:
    """Two sizes are equal for every input this graph is compiled for."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def inspected(
    finder: Pass, gm: GraphModule, config: Config, target: Target
) -> Iterator[tuple[Node, Match | Rejection]]:
    """Every candidate of a pass in a graph and the checkpoint bodies under it, and what it says of it."""
    for unit, calls in bodies(gm):
        ctx = Context(unit, config, target, calls)
        for site in finder.sites(unit.graph):
            yield site, finder.inspect(site, ctx)


def module_of(node: Node) -> str:
    """The path of the module whose forward made a node, as a user would write it."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        return _tidy(str(path))
    return ""


def _tidy(path: str) -> str:
    """`L['self']._modules['layers']._modules['0']` and the like as `layers.0`."""
    import re

    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"^L\['(?:self|fn|mod|model)'\]\.?", "", path)
    path = re.sub(r"^[GL]\['([^']*)'\]", r"\1", path)
    path = re.sub(r"\.(\d+)\b|\[(\d+)\]", lambda m: f".{m[1] or m[2]}", path)
    return path.strip(".")


def source_of(node: Node) -> str:
    """The innermost user line of a node, as `file:line`."""
    frame = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        line = line.strip()
        if line.startswith("File "):
            parts = line.split('"')
            number = line.split("line ")[1].split(",")[0] if "line " in line else "?"
            frame = f"{parts[1].rsplit('/', 1)[-1]}:{number}" if len(parts) > 1 else ""
    return frame
