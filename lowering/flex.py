"""FlexAttention, written into the graph as its higher-order operator with a block mask made of graph nodes.

The mask function and the score function are sub-GraphModules rendered from the spec; the lists of key blocks
that a query block visits come from interval arithmetic over the same formula (`block_mask`). One adapter per
layout of the operator's private block-mask tuple: 13 entries in torch 2.11, 17 from 2.13 on.
"""

from __future__ import annotations

import inspect
import math
import operator
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.block_mask import BLOCK, BlockLists, block_lists
from kp_compiler.lowering.dead_rows import after_zeros, unkept
from kp_compiler.lowering.dense_mask import GraphIndices
from kp_compiler.metadata import tensor_of, trace_fake, value_of
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target

_LN2 = math.log(2.0)
_LOWEST = -(2.0**127)  # times log2(e) still a float32


def check(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    if target.device == "cuda" and not target.has_triton:
        return Rejection("library", "FlexAttention needs Triton.")
    if target.device == "cpu" and not target.reference:
        return Rejection("device", "FlexAttention is used on CUDA devices.")
    if shape.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Rejection("dtype", f"FlexAttention takes half and float32, this site is {shape.dtype}.")
    if spec.dropout_p:
        return Rejection("dropout", "FlexAttention has no dropout.")
    if not isinstance(shape.head_dim, int) or not isinstance(shape.value_dim, int):
        return Rejection("head-dim", "FlexAttention needs head sizes known at compile time.")
    if min(shape.head_dim, shape.value_dim) < 16:
        return Rejection("head-dim", "FlexAttention needs head sizes of at least 16.")
    if _known_equal(shape.queries, 1):
        return Rejection("decode", "A single query gains nothing from a block mask.")
    if shape.bias_grad:
        return Rejection("bias-grad", "Gradients of a bias are not taken through FlexAttention.")
    return mask_render.unreadable(spec) or unkept(spec, shape)


def _known_equal(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def emit(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    """q, k, v [B,H,S,D] to out [B,H,S,E]; sinks and dead rows are settled with the returned log-sum-exp."""
    q, k, v = (node.args[index] for index in range(3))
    blocks = block_lists(emit, node, spec)
    mask_graph, mask_buffers = _mask_function(emit, node, spec)
    score_graph, score_buffers = _score_function(emit, node, spec)
    needs_lse = spec.sink is not None or spec.dead_rows in ("mean", "nan")
    options = _kernel_options(q, k, v, shape, needs_lse)
    block_mask = _block_mask_tuple(emit, q, k, blocks, mask_graph)
    out = emit.call_without_grad(
        torch.ops.higher_order.flex_attention,
        q, k, v, score_graph, block_mask, spec.scale, options, tuple(score_buffers), tuple(mask_buffers),
    )  # fmt: skip
    result = emit.call(operator.getitem, out, 0)
    if needs_lse:
        lse = emit.call(operator.getitem, out, 1)
        result = _epilogue(emit, node, spec, shape, result, lse)
    return result


# -------------------------------------------------------------------------------------------------------
# sub-graphs


def _add_subgraph(emit: Any, graph: Graph, prefix: str) -> Node:
    """Register a sub-GraphModule and return the `get_attr` node that names it."""
    owner = emit.graph.owning_module
    name = next(f"{prefix}_{i}" for i in range(10**6) if not hasattr(owner, f"{prefix}_{i}"))
    owner.add_module(name, GraphModule(torch.nn.Module(), graph))
    with emit.graph.inserting_before(emit.anchor):
        node = emit.graph.get_attr(name)
    node.meta["example_value"] = getattr(owner, name)
    emit.made.append(node)
    return node


class _SubEmitter:
    """Writes scalar operations into a sub-graph, with metadata."""

    def __init__(
        self, device: Any, mode: Any, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        self.graph = Graph()
        self.mode = mode
        self.inputs: dict[str, Node] = {}
        for name, dtype in zip(names, dtypes, strict=True):
            with mode:
                value = torch.empty((), dtype=dtype, device=device)
            self.inputs[name] = self.placeholder(name, value)

    def placeholder(self, name: str, value: Any) -> Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        trace_fake(node, self.mode)
        return node


class _Scalars(GraphIndices):
    """The algebra of FlexAttention's mask function: 0-dimensional index tensors."""

    def lookup(self, index: int, args: list[Any]) -> Any:
        places = [self._call(torch.full_like, self.index["q"], a) if isinstance(a, int) else a for a in args]
        return (
            self._call(torch.ops.aten.index.Tensor, self.tensors[index], places)
            if args
            else self.tensors[index]
        )

    def truth(self, value: bool) -> Any:
        return self._call(torch.full, (), value, dtype=torch.bool, device=value_of(self.index["q"]).device)


def _mask_function(emit: Any, node: Node, spec: AttentionSpec) -> tuple[Node, list[Any]]:
    """mask_mod(b, h, q, k, *buffers) -> bool."""
    operands: Any = node.args[3]
    sub = _SubEmitter(value_of(node.args[0]).device, emit.mode, mask_render.INDEX_NAMES, (torch.int32,) * 4)
    tensors = [operands[index] for index in spec.mask.tensors]
    scalars = list(node.args[4])[: spec.mask.scalars]  # type: ignore[arg-type]
    inner = [sub.placeholder(f"t{i}", value_of(t)) for i, t in enumerate(tensors)]
    inner_scalars = [sub.placeholder(f"n{i}", value_of(s)) for i, s in enumerate(scalars)]
    if spec.mask.kind == "tensor":
        result: Any = None
        for tensor in inner:
            one = _broadcast_lookup(sub, tensor)
            result = one if result is None else sub.call(torch.logical_and, result, one)
    else:
        algebra = _Scalars(sub, inner, inner_scalars, dict(sub.inputs))
        result = mask_render.render(mask_render.parse(spec.mask.expr), algebra)
    sub.graph.output(result)
    return _add_subgraph(emit, sub.graph, "kp_mask_mod"), [*tensors, *scalars]


def _score_function(emit: Any, node: Node, spec: AttentionSpec) -> tuple[Node, list[Any]]:
    """score_mod(score, b, h, q, k, *buffers) -> score."""
    operands: Any = node.args[3]
    names = ("score", *mask_render.INDEX_NAMES)
    sub = _SubEmitter(value_of(node.args[0]).device, emit.mode, names, (torch.float32, *(torch.int32,) * 4))
    score = sub.inputs["score"]
    if spec.softcap is not None:
        score = sub.call(torch.mul, score, 1.0 / spec.softcap)
        score = sub.call(torch.mul, sub.call(torch.tanh, score), spec.softcap)
    buffers = [operands[bias.operand] for bias in spec.biases]
    for index, bias in enumerate(spec.biases):
        inner = sub.placeholder(f"bias{index}", value_of(buffers[index]))
        term = _lifted(sub, _broadcast_lookup(sub, inner))
        if bias.coeff != 1.0:
            term = sub.call(torch.mul, term, bias.coeff)
        score = sub.call(torch.add, score, term)
    _placeholders_first(sub.graph)
    sub.graph.output(score)
    return _add_subgraph(emit, sub.graph, "kp_score_mod"), buffers


def _lifted(sub: _SubEmitter, term: Node) -> Node:
    """Finite fills are raised to where the kernel's factor of log2(e) leaves them finite: a row of them is
    the average of all values, a row of infinities is not."""
    value = tensor_of(term)
    assert value is not None
    if value.dtype not in (torch.bfloat16, torch.float32):
        return term
    low = sub.call(torch.lt, term, _LOWEST)
    infinite = sub.call(torch.eq, term, -math.inf)
    fill = sub.call(torch.logical_and, low, sub.call(torch.logical_not, infinite))
    return sub.call(torch.masked_fill, term, fill, _LOWEST)


def _placeholders_first(graph: Graph) -> None:
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    for node in [n for n in graph.nodes if n.op == "placeholder"] if first is not None else []:
        if first is not None and node > first:
            first.prepend(node)


def _broadcast_lookup(sub: _SubEmitter, tensor: Node) -> Node:
    """The element of a tensor that broadcasts to [B, H, S, T] at (b, h, q, k)."""
    value = tensor_of(tensor)
    assert value is not None
    names = mask_render.INDEX_NAMES[4 - value.dim() :]
    zero = sub.call(torch.zeros_like, sub.inputs["q"])
    places = [
        zero if isinstance(size, int) and size == 1 else sub.inputs[name]
        for size, name in zip(value.shape, names, strict=True)
    ]
    return sub.call(torch.ops.aten.index.Tensor, tensor, places) if places else tensor


# -------------------------------------------------------------------------------------------------------
# block mask


def _block_mask_tuple(emit: Any, q: Any, k: Any, blocks: BlockLists, mask_graph: Node) -> tuple[Any, ...]:
    """The operator's block-mask tuple in this torch's order of entries."""
    values = {
        "seq_lengths": (emit.size(q, 2), emit.size(k, 2)),
        "kv_num_blocks": (blocks.kv_num,),
        "kv_indices": (blocks.kv_indices,),
        "full_kv_num_blocks": (blocks.full_kv_num,),
        "full_kv_indices": (blocks.full_kv_indices,),
        "q_num_blocks": (blocks.q_num,),
        "q_indices": (blocks.q_indices,),
        "full_q_num_blocks": (blocks.full_q_num,),
        "full_q_indices": (blocks.full_q_indices,),
        "block_size": (BLOCK, BLOCK),
        "mask_mod": (mask_graph,),
    }
    return tuple(item for name in _tuple_layout() for item in values.get(name, (None,)))


@cache
def _tuple_layout() -> tuple[str, ...]:
    """The entries of `BlockMask.as_tuple()` in order, read from this torch's own source."""
    from torch.nn.attention.flex_attention import BlockMask

    source = inspect.getsource(BlockMask.as_tuple)
    body = source[source.rindex("return (") :]
    names = []
    for line in body.splitlines()[1:]:
        token = line.strip().rstrip(",").lstrip("*").removeprefix("self.")
        if token.isidentifier():
            names.append(token)
    known = {"seq_lengths", "block_size", "kv_num_blocks", "q_num_blocks", "mask_mod"}
    if not known <= set(names):
        raise RuntimeError(f"this torch's BlockMask has a layout kp does not know: {names}")
    return tuple(names)


def _kernel_options(q: Any, k: Any, v: Any, shape: AttentionShape, needs_lse: bool) -> dict[str, Any]:
    from torch.nn.attention import flex_attention as module

    # ROWS_GUARANTEED_SAFE stays off: the kernel needs it per visited block, not per row. The first block of a
    # window leaves rows without a key, and with it on they turned into NaN (one H100, torch 2.11,
    # 2026-11-23).
    options = dict(module._apply_kernel_options(value_of(q), value_of(k), value_of(v), needs_lse, None))
    options["OUTPUT_LOGSUMEXP"] = shape.training or needs_lse
    return options


# ---------------------------------------------------------------------------------------------------------
# epilogue


def _epilogue(
    emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape, out: Node, lse: Node
) -> Node:
    """Sinks and dead rows. `lse` [B,H,S] is in base 2, −inf where nothing was kept."""
    column = emit.call(torch.unsqueeze, lse, -1)
    if spec.sink is not None:
        operands: Any = node.args[3]
        sink = emit.call(
            torch.reshape,
            emit.call(torch.ops.aten.to.dtype, operands[spec.sink], torch.float32),
            [1, -1, 1, 1],
        )
        share = emit.call(torch.sigmoid, emit.call(torch.sub, emit.call(torch.mul, column, _LN2), sink))
        return emit.cast(emit.call(torch.mul, out, share), shape.dtype)
    return after_zeros(emit, node, spec, shape, out, column)
