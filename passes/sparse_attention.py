"""Compute only the blocks of attention that hold most of it, chosen from q and k when the model runs.

    kp.attention(q, k, v, [], causal) ─▶ kp.attention(q, k, v, [], causal, content, 10% of blocks)

An approximation, and off by default. Which blocks is decided for each head and each 128 queries, on the
device; inside of the blocks the mask stays what it is, and gradients are those of what was computed.

Fires where the mask is proved and kp's own kernels take the site. Refuses contexts shorter than `min_tokens`,
scores with biases that the selector would not see, rows without keys that mean something else than zeros,
and, under `auto`, sites where choosing is predicted to cost what leaving out saves; those stay dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from kp_compiler import cost
from kp_compiler.lowering import ops, select, table, tap
from kp_compiler.metadata import hint, tensor_of
from kp_compiler.passes import sparse_choice
from kp_compiler.passes.attention import shape_of
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    fake_mode,
    module_of,
    not_on_cpu,
)
from kp_compiler.runtime import add_inputs
from kp_compiler.specs import AttentionShape, AttentionSpec, SparseSpec


class SparseAttention:
    """See the module docstring."""

    name = "sparse_attention"
    tier: Tier = "approximate"
    kind: Kind = "attention"
    final = False
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        return not_on_cpu(ctx)

    def sites(self, graph: Graph) -> Iterator[Node]:
        yield from ops.attentions(graph)

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        config, shape = ctx.config.sparse_attention, _whole(shape_of(site, ctx), ctx)
        if hint(shape.keys) < config.min_tokens:
            return Rejection(
                "short",
                f"{hint(shape.keys)} keys are fewer than {config.min_tokens}.",
                "sparse_attention={'min_tokens': …} sets where it begins.",
            )
        dense = ops.spec_of(site)
        if tap.current() is not None and dense.biases:
            return Rejection(
                "bias", "What blocks cost is measured for scores of q and k; a bias shifts them."
            )

        def fits(sparse: SparseSpec) -> Rejection | None:
            return select.refused(dataclasses.replace(dense, sparse=sparse), shape)

        choice = sparse_choice.choose(config, site_name(site, ctx), shape, fits)
        if isinstance(choice, Rejection):
            return choice
        if choice.gates is not None and ctx.calls:
            return Rejection("checkpoint", "Gates can't be handed to the body of a checkpoint.")
        spec = dataclasses.replace(dense, sparse=choice.sparse)
        chosen = table.choose(spec, shape, ctx.target, ctx.config.attention)
        if isinstance(chosen, Rejection):
            return chosen
        weighed = config.mode == "auto" and tap.current() is None
        reason = _no_gain(spec, shape, chosen.name, ctx) if weighed else None
        return reason or Match(site, (spec, choice), spec=str(spec))

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site, (spec, choice) = match.site, match.data
        observer = tap.current()
        if observer is not None:
            seen = tap.emit_tap(Emitter(site, site), site, spec, site_name(site, ctx), observer)
            site.update_arg(0, seen)
            return site
        if choice.gates is not None:
            spec = _with_gates(site, spec, choice.gates, ctx)
        site.update_arg(5, spec.to_json())
        site.meta["kp_measured"] = choice.measured
        return site


def _whole(shape: AttentionShape, ctx: Context) -> AttentionShape:
    """What a rank attends with that shares the sequence: some heads, and all tokens."""
    ranks = ctx.config.context_parallel.mesh
    if not ctx.config.shares_sequences() or ranks is None:
        return shape
    heads, kv_heads = (max(1, n // ranks.size) for n in (shape.heads, shape.kv_heads))
    queries, keys = (n * ranks.size for n in (shape.queries, shape.keys))
    return dataclasses.replace(shape, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys)


def site_name(site: Node, ctx: Context) -> str:
    """The module path, and which of its sites in the graph it is, where that is not the first."""
    module = module_of(site)
    peers = [node for node in ops.attentions(ctx.gm.graph) if module_of(node) == module]
    place = peers.index(site)
    return f"{module}#{place}" if place else module


def _with_gates(site: Node, spec: AttentionSpec, gates: tuple[Tensor, Tensor], ctx: Context) -> AttentionSpec:
    """Gates become inputs of the graph, and operands of the site."""
    given, q = site.args[3], tensor_of(site.args[0])
    assert isinstance(given, list | tuple) and q is not None and spec.sparse is not None
    with fake_mode(site.graph):
        fakes = [torch.empty(x.shape, device=q.device) for x in gates]
    nodes = add_inputs(ctx.gm, Gates(gates, q.device), fakes, site, [True, True])
    site.update_arg(3, [*given, *nodes])
    sparse = dataclasses.replace(spec.sparse, gates=(len(given), len(given) + 1))
    return dataclasses.replace(spec, sparse=sparse)


@dataclass(frozen=True, eq=False)
class Gates:
    """Provides them, on the device of a site."""

    gates: tuple[Tensor, Tensor]
    device: torch.device
    there: list[Tensor] = field(default_factory=list)

    def tensors(self, args: Sequence[Any]) -> Sequence[Tensor]:
        if not self.there:
            self.there.extend(x.to(self.device) for x in self.gates)
        return self.there


def _no_gain(spec: AttentionSpec, shape: AttentionShape, impl: str, ctx: Context) -> Rejection | None:
    whole = dataclasses.replace(spec, sparse=None)
    dense = table.choose(whole, shape, ctx.target, ctx.config.attention)
    if isinstance(dense, Rejection):
        return None
    assert spec.sparse is not None
    at_best = spec.sparse  # what `mass` and `error` will compute is not known: no more than a tenth, at best
    if at_best.mass is not None or at_best.error is not None:
        at_best = dataclasses.replace(at_best, mass=None, error=None, density=min(at_best.density, 0.1))
    best = dataclasses.replace(spec, sparse=at_best)
    mine, theirs = (
        cost.predict(each, shape, name, ctx.target) for each, name in ((best, impl), (whole, dense.name))
    )
    if mine is None or theirs is None or mine["forward_ms"] < theirs["forward_ms"]:
        return None
    return Rejection(
        "no-gain",
        f"Choosing and computing blocks is predicted to take {mine['forward_ms']} ms, {dense.name} for all "
        f"of them {theirs['forward_ms']}.",
        "sparse_attention='on' takes it all the same.",
    )
