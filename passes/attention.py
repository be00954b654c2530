"""Choose a kernel for every recognised attention site and write it into the graph.

    kp.attention(q, k, v, [], causal) ─▶ aten._scaled_dot_product_cudnn_attention(q, k, v, None, …,
    is_causal=True)[0]

Fires where the lowering table has a kernel for the spec on the target. Refuses where none has, where a kernel
asked for by name can't serve the site, and under `auto` where the cost model predicts no gain; the original
nodes then come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node

from kp_compiler import cost
from kp_compiler.lowering import ops, table, tap
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    module_of,
    not_on_cpu,
    settle,
)
from kp_compiler.specs import AttentionShape


class Attention:
    """See the module docstring."""

    name = "attention"
    tier: Tier = "exact"
    kind: Kind = "attention"
    final = True
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        return not_on_cpu(ctx)

    def sites(self, graph: Graph) -> Iterator[Node]:
        yield from ops.attentions(graph)

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        spec = ops.spec_of(site)
        shape = shape_of(site, ctx)
        chosen = table.choose(spec, shape, ctx.target, ctx.config.attention)
        if isinstance(chosen, Rejection):
            return chosen
        predicted = cost.predict(spec, shape, chosen.name, ctx.target)
        asked = spec.sparse is not None  # by name; sparse_attention has weighed it against dense attention
        if ctx.config.attention.mode == "auto" and not asked and predicted and predicted["gain"] < 1:
            return Rejection(
                "no-gain",
                f"{chosen.name} is predicted to take {predicted['forward_ms']} ms, the site as it is "
                f"{predicted['before_ms']}.",
                "attention='on' takes it all the same.",
            )
        if (measured := site.meta.get("kp_measured")) is not None:
            predicted = {**(predicted or {}), "calibration": measured.summary()}
        if asked and ctx.config.verify:
            predicted = dict(predicted or {})  # the first call adds what it finds
        note = _checkpoint_note(chosen, ctx)
        return Match(
            site,
            (chosen, spec, shape),
            notes=(note,) if note is not None else (),
            impl=chosen.name,
            spec=str(spec),
            shape=shape.describe(),
            predicted=predicted,
        )

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        chosen, spec, shape = match.data
        site = match.site
        emit = Emitter(site, site)
        if spec.sparse is not None and ctx.config.verify and not ctx.calls:
            assert match.predicted is not None
            site.update_arg(0, tap.watch(emit, site, spec, module_of(site), match.predicted))
        out = chosen.emit(emit, site, spec, shape)
        settle(site, out)
        return out


def _checkpoint_note(chosen: table.Implementation, ctx: Context) -> Rejection | None:
    """A selective checkpoint policy that saves SDPA names its ATen operators: say so where it does not name
    the one that was chosen."""
    context_fn = ctx.gm.meta.get("_checkpoint_context_fn") if ctx.calls else None
    if context_fn is None:
        return None
    saved = {name: _saves(context_fn, op) for name, op in table.ATEN_OPERATORS.items()}
    if saved.get(chosen.name) or not (any(saved.values()) or None in saved.values()):
        return None
    known = next((name for name in saved if saved[name]), None)
    text = f"The checkpoint policy saves SDPA, but not {chosen.name}"
    if known is None:
        text = f"If the checkpoint policy saves SDPA, it may not know {chosen.name}"
    return Rejection(
        "checkpoint-policy",
        f"{text}: attention is recomputed.",
        f"attention={{'impl': '{known or 'flash'}'}} keeps an operator that such policies list.",
    )


def _saves(context_fn: Any, op: Any) -> bool | None:
    """Whether a policy saves an operator's result; None where it can't be asked without running it."""
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

    try:
        decision = context_fn()[0].policy_fn(SelectiveCheckpointContext(is_recompute=False), op)
    except Exception:  # the user's code, which may want real arguments
        return None
    return decision is True or decision in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def shape_of(site: Node, ctx: Context) -> AttentionShape:
    """The site's shape; under `plan` with the dtype that was assumed."""
    shape = table.shape_of(site, ops.spec_of(site), ctx.target)
    assumed = ctx.assumed_dtype
    return (
        dataclasses.replace(shape, dtype=assumed)
        if assumed is not None and shape.dtype.is_floating_point
        else shape
    )
