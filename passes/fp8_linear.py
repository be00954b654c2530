"""Run products with a weight in FP8.

    kp.linear(x, w) ─▶ kp.fp8_linear(x, [w])[0] ─▶ scale ─▶ cast ─▶ _scaled_mm, and the same backward
    kp.linear(x, wq), kp.linear(x, wk), kp.linear(x, wv) ─▶ one kp.fp8_linear(x, [wq, wk, wv])

Approximate, and off by default. Fires on bfloat16 and float16 sites whose sizes are multiples of 16, where
the cost model predicts a gain (`auto`) or wherever that is possible (`on`). Refuses other sizes and types,
devices without FP8, and rows of scales with float16. Weights that read the same activation become one
product, unless a result is written to or viewed in a way that needs it contiguous.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from kp_compiler import cost
from kp_compiler.config import Fp8LinearConfig
from kp_compiler.lowering import ops, te
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.fp8 import cached, delayed, linear, state
from kp_compiler.lowering.fp8.quantize import ALIGNMENT
from kp_compiler.lowering.fp8.recipes import BLOCK, Fp8Spec, spec_for
from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    fake_mode,
    left_out,
    module_of,
    settle,
)
from kp_compiler.runtime import add_inputs, position, providers
from kp_compiler.specs import LinearShape, LinearSpec
from kp_compiler.target import may_shard_parameters
from kp_compiler.writes import storage_of

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Group:
    """Sites that become one operator: `members` in graph order, the first stands for all."""

    members: tuple[Node, ...]
    spec: Fp8Spec
    shape: LinearShape
    predicted: dict[str, Any] | None


class Fp8Linear:
    """See the module docstring."""

    name = "fp8_linear"
    tier: Tier = "approximate"
    kind: Kind = "linear"
    final = True
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        target, config = ctx.target, ctx.config.fp8_linear
        if target.device == "cpu" and not target.reference:
            return Rejection(
                "cpu", "CPU graphs are not rewritten.", "options={'cpu_rewrites': True} does it anyway."
            )
        if target.sm < 89 and not target.reference:
            return Rejection("device", f"FP8 needs compute capability 8.9, this is {target.sm / 10}.")
        return te.absent(target) if config.impl == "te" else None

    def sites(self, graph: Graph) -> Iterator[Node]:
        yield from (node for node in graph.nodes if ops.is_linear(node))

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        if (group := ctx.cache.get(site)) is not None:  # decided with the first member
            return self._match(site, group, ctx)
        refused = _check(site, ctx)
        if refused is not None:
            return refused
        group = _group(site, ctx)
        if ctx.config.fp8_linear.mode == "auto":
            predicted = group.predicted
            if predicted is not None and predicted["gain"] < 1:
                return Rejection(
                    "no-gain",
                    f"FP8 is predicted to take {predicted['fp8_ms']} ms, now it is {predicted['before_ms']}.",
                    "fp8_linear='on' takes it all the same.",
                )
        ctx.cache.update(dict.fromkeys(group.members, group))
        return self._match(site, group, ctx)

    def _match(self, site: Node, group: Group, ctx: Context) -> Match:
        text = str(group.spec) + (f", {len(group.members)} merged" if len(group.members) > 1 else "")
        impl = "reference" if ctx.target.reference else "scaled_mm"
        if ctx.config.fp8_linear.impl == "te":
            impl = "te"
        shape = _shape(site, ctx).describe()
        return Match(site, group, impl=impl, spec=text, shape=shape, predicted=group.predicted)

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site, group = match.site, match.data
        if "kp_fp8" not in site.meta:
            _emit(group, ctx)
        out = site.meta["kp_fp8"]
        settle(site, out)
        return out


def _emit(group: Group, ctx: Context) -> None:
    """Write the operator in front of the first member; each member finds its output in its metadata."""
    first = group.members[0]
    emit = Emitter(first, first.meta["kp_root"])
    x, spec = first.args[0], group.spec.to_json()
    weights, biases = [m.args[1] for m in group.members], [m.args[2] for m in group.members]
    if ctx.config.fp8_linear.impl == "te":
        node = emit.call(te.fp8_linear_te(), x, weights, biases, spec)
    elif _cacheable(group.shape, weights, ctx):
        provider = cached.CachedWeights(tuple(map(position, weights)), spec)
        with emit.mode, torch.no_grad():
            values = cached.quantized([tensor_of(w) for w in weights], spec)
        copies = add_inputs(ctx.gm, provider, values, first, staying=[True] * len(values))
        sizes = [_shape(member, ctx).outputs for member in group.members]
        node = emit.call(cached.fp8_linear_cached(), x, *copies, sizes, biases, spec)
    elif group.spec.recipe == "delayed":
        inputs = _delayed_inputs(first, weights, group.spec, ctx)
        node = emit.call(delayed.fp8_linear_delayed(), x, weights, biases, inputs[0], inputs[1:], spec)
    else:
        node = emit.call(linear.fp8_linear(), x, weights, biases, spec)
    for index, member in enumerate(group.members):
        member.meta["kp_fp8"] = emit.call(operator.getitem, node, index)


def _delayed_inputs(site: Node, weights: list[Any], spec: Fp8Spec, ctx: Context) -> list[Node]:
    """Scales and one-element tensors of a site, as nodes of its graph. One provider serves all sites."""
    outer = ctx.calls[0] if ctx.calls else site
    top, config = outer.graph.owning_module, ctx.config.fp8_linear
    provider = next((p for p in providers(top) if isinstance(p, state.DelayedScaling)), None)
    if provider is None:
        limits = state.limits_of(spec)
        provider = state.DelayedScaling(config.amax_history, config.margin, limits, reduce=config.reduce_amax)
    provider.add(tuple(position(_outer(w, ctx)) for w in weights))
    like = tensor_of(weights[0])
    assert like is not None
    with fake_mode(outer.graph), torch.no_grad():
        values = state.fake_inputs(like)
    staying = [False, *(True for _ in values[1:])]  # scales are made anew in each step
    nodes = add_inputs(top, provider, values, top.graph.find_nodes(op="placeholder")[-1].next, staying)
    return [ops.import_node(node, site, ctx.calls) for node in nodes]


def _outer(node: Node, ctx: Context) -> Node:
    """What a checkpoint body's placeholder stands for."""
    if not ctx.calls or node.op != "placeholder":
        return node
    places = node.graph.find_nodes(op="placeholder")
    outer = ctx.calls[0].args[1 + places.index(node)]
    return outer if isinstance(outer, Node) else node


def _cacheable(shape: LinearShape, weights: list[Any], ctx: Context) -> bool:
    """No gradient is wanted, and the weights are parameters of the whole graph that it does not write to."""
    if not ctx.config.fp8_linear.cache_weights or ctx.calls or shape.grad_x or shape.grad_w:
        return False
    if may_shard_parameters():
        return False
    return all(
        w.op == "placeholder"
        and isinstance(tensor_of(w), torch.nn.Parameter)
        and storage_of(w) not in ctx.writes.by_storage
        for w in weights
    )


def _shape(site: Node, ctx: Context) -> LinearShape:
    x, weight, out = (tensor_of(node) for node in (site.args[0], site.args[1], site))
    assert x is not None and weight is not None and out is not None
    rows: Any = 1
    for size in x.shape[:-1]:
        rows = rows * size
    inputs, outputs = weight.shape if _transposed(site) else reversed(weight.shape)
    training = out.requires_grad
    return LinearShape(
        rows, inputs, outputs, ctx.assumed_dtype or out.dtype,
        training and x.requires_grad, training and weight.requires_grad,
    )  # fmt: skip


def _transposed(site: Node) -> bool:
    return LinearSpec.from_json(str(site.args[3])).transposed


def _settings(site: Node, ctx: Context) -> Fp8LinearConfig:
    """The pass's settings, with the recipe that the site's module has; of several names the last one that
    fits counts."""
    config, module = ctx.config.fp8_linear, module_of(site)
    found = [recipe for part, recipe in config.recipes.items() if part in module]
    return dataclasses.replace(config, recipe=found[-1]) if found else config


def _check(site: Node, ctx: Context) -> Rejection | None:
    shape, config = _shape(site, ctx), _settings(site, ctx)
    if config.impl == "te" and (refused := te.check(config, ctx.target)) is not None:
        return refused
    if shape.rows == 0 and isinstance(shape.rows, int):
        return Rejection("empty", "The input has no rows.")
    if shape.dtype not in HALF and not (ctx.target.reference and shape.dtype == torch.float32):
        return Rejection("dtype", f"FP8 products give bfloat16 or float16, this site is {shape.dtype}.")
    if shape.dtype == torch.float16 and config.recipe not in ("tensorwise", "delayed"):
        return Rejection("dtype", "Products with several scales give bfloat16 only.")
    if config.recipe == "delayed" and (shape.grad_x or shape.grad_w):
        weight = _outer(site.args[1], ctx)  # type: ignore[arg-type]
        if weight.op != "placeholder" or not isinstance(tensor_of(weight), torch.nn.Parameter):
            return Rejection("no-parameter", "Delayed scaling keeps its state with a parameter: none here.")
        if len(ctx.calls) > 1:
            return Rejection("shared-body", "A checkpointed body that is called twice has no own state.")
    own_blocks = config.recipe == "blockwise" and config.impl != "te"
    unit = 4 * BLOCK if own_blocks else ALIGNMENT
    for name, size in (("inputs (K)", shape.inputs), ("outputs (N)", shape.outputs)):
        if size % unit:
            return Rejection("alignment", f"{size} {name} are no multiple of {unit}.")
    return None


def _group(site: Node, ctx: Context) -> Group:
    """The site and the later ones that can share its product."""
    members = [site]
    config = _settings(site, ctx)
    if config.merge:
        members += [
            other for other in _siblings(site, ctx) if _check(other, ctx) is None and _joins(site, other, ctx)
        ]
        wider = sum(_shape(member, ctx).outputs for member in members)
        if len(members) > 1 and not all(_takes_strides(member, wider, ctx) for member in members):
            members = [site]
    shapes = [_shape(member, ctx) for member in members]
    total = LinearShape(
        shapes[0].rows, shapes[0].inputs, sum(s.outputs for s in shapes), shapes[0].dtype,
        any(s.grad_x for s in shapes), any(s.grad_w for s in shapes),
    )  # fmt: skip
    tensor = tensor_of(site)
    assert tensor is not None
    spec = spec_for(
        config, transposed=_transposed(site), dtype=str(tensor.dtype).removeprefix("torch."),
        fingerprint=fingerprint(), training=total.grad_x or total.grad_w, save=_saved(site, ctx),
    )  # fmt: skip
    cached = config.impl != "te" and _cacheable(total, [m.args[1] for m in members], ctx)
    return Group(
        tuple(members), spec, total, cost.predict_linear(total, spec.recipe, ctx.target, cached=cached)
    )


def _saved(site: Node, ctx: Context) -> str:
    """What is kept of the activation: as it is, since a producer may be computed again. An input of the graph
    lies in memory: the pass that casts it writes the transposed copy as well."""
    x = site.args[0]
    direct = isinstance(x, Node) and x.op == "placeholder" and not ctx.calls
    return "fp8" if direct and ctx.config.fp8_linear.save != "input" else "input"


def _siblings(site: Node, ctx: Context) -> list[Node]:
    """Later `kp.linear` nodes that read the same activation and have no group yet."""
    x = site.args[0]
    assert isinstance(x, Node)
    return sorted(n for n in x.users if ops.is_linear(n) and n > site and n not in ctx.cache)


def _joins(site: Node, other: Node, ctx: Context) -> bool:
    """`other` could stand where `site` stands: its weight and bias are there, nothing was written in between,
    and gradients are wanted of both alike."""
    operands = [a for a in other.args[1:3] if isinstance(a, Node)]
    if any(not (a < site) or ctx.writes.between(a, other, since=site) for a in (*operands, site.args[0])):
        return False
    mine, theirs = _shape(site, ctx), _shape(other, ctx)
    alike = mine.dtype == theirs.dtype and (mine.grad_x, mine.grad_w) == (theirs.grad_x, theirs.grad_w)
    alike = (
        alike and _transposed(site) == _transposed(other) and _settings(site, ctx) == _settings(other, ctx)
    )
    return alike and not left_out(ctx.config.fp8_linear, other)


def _takes_strides(site: Node, wider: int, ctx: Context) -> bool:
    """Nothing asks the result for a layout that a slice of a matrix of `wider` columns does not have: every
    view of it, and of that, is tried. Operators from elsewhere may assume more than they say."""
    if storage_of(site) in ctx.writes.by_storage:
        return False
    out = tensor_of(site)
    assert out is not None
    strides = [*(wider * stride // out.shape[-1] for stride in out.stride()[:-1]), 1]
    with fake_mode(site.graph):
        value = torch.empty_strided(out.shape, strides, dtype=out.dtype, device=out.device)
    return _views_work(site, value, storage_of(site))


def _views_work(node: Node, value: torch.Tensor, storage: int | None) -> bool:
    for user in node.users:
        if isinstance(user.target, torch._ops.OpOverload) and user.target.namespace not in ("aten", "kp"):
            return False
        if isinstance(user.target, torch._ops.HigherOrderOperator) or "as_strided" in str(user.target):
            return False  # may count on a layout without saying so
        if user.op not in ("call_function", "call_method"):
            return False  # leaves the graph: who reads it next is not known
        if storage_of(user) != storage:
            continue
        args, kwargs = torch.fx.map_arg(
            (user.args, user.kwargs), lambda n: value if n is node else value_of(n)
        )
        try:
            with fake_mode(node.graph):
                target: Any = user.target
                view = (
                    getattr(args[0], target)(*args[1:], **kwargs)
                    if user.op == "call_method"
                    else target(*args, **kwargs)
                )
        except Exception:  # whatever torch says to a view that can't be had
            return False
        if not isinstance(view, torch.Tensor) or not _views_work(user, view, storage):
            return False
    return True
