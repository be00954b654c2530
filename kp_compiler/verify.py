"""Run a matched site beside its replacement, before the replacement is used: outputs and gradients, against
float64.

The site's original nodes and its `kp.attention` node are copied into a graph of their own, the chosen kernel
is written there, and both run on the real device at the site's own sizes with random inputs and the real mask
code. The replacement may be at most TOLERANCE times as far from a float64 run of the original as the original
itself is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.metadata import hint, tensor_of, value_of
from kp_compiler.passes.base import Context, Emitter, Match
from kp_compiler.report import Rejection
from kp_compiler.runtime import provided_input

TOLERANCE = 1.5  # one draw is noisy; benchmarks/attention_numerics.py holds the mean over many to 1.1
SLACK = 4  # and this many units of rounding, for sites where the original is exact
MAX_SCORES = 2**28  # elements of the score matrix; beyond, the float64 run would take more than 2 GiB a copy
_WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}


@dataclass(frozen=True)
class Verdict:
    """What a check found: `text` for the record, `failure` if the replacement must not be used."""

    text: str
    failure: Rejection | None = None


def verify_site(site: Node, match: Match, ctx: Context) -> Verdict:
    """Check one site that the attention pass is about to lower."""
    chosen, spec, shape = match.data
    if spec.dropout_p:
        return Verdict("skipped: dropout is random")
    if spec.sparse is not None:
        from kp_compiler.verify_sparse import verify_sparse

        return verify_sparse(site, match, ctx)
    skipped = not_checked((shape.batch, shape.heads, shape.queries, shape.keys), ctx)
    if skipped is not None:
        return skipped
    graph, originals, copied = extract(site)
    owner = GraphModule(torch.nn.Module(), graph)
    emit = Emitter(copied, copied)
    lowered = chosen.emit(emit, copied, spec, shape)
    copied.replace_all_uses_with(lowered)
    graph.erase_node(copied)
    owner.recompile()
    with forked(originals):
        return _compare(owner, originals, shape.training)


def not_checked(scores: tuple[Any, ...], ctx: Context) -> Verdict | None:
    """Why a site is not run: more scores, of these sizes, than a float64 run has memory for, or no inputs."""
    count = math.prod(hint(x) for x in scores)
    if count > MAX_SCORES:
        return Verdict(f"skipped: {count} scores are too many for a float64 run")
    return Verdict("skipped: the site lies in a checkpoint body") if ctx.calls else None


def forked(inputs: list[Node]) -> Any:
    """Random numbers that are drawn inside leave the user's as they were."""
    devices = {t.device.index or 0 for t in map(tensor_of, inputs) if t is not None and t.is_cuda}
    return torch.random.fork_rng(devices=devices)


def extract(site: Node) -> tuple[Graph, list[Node], Node]:
    """The site's nodes, original and recognised, as a graph of two outputs; boundaries become
    placeholders."""
    root, out = site.meta["kp_root"], site.meta["kp_out"]
    edge = set(site.meta["kp_operands"]) | set(
        site.graph.find_nodes(op="call_function", target=provided_input)
    )
    needed: set[Node] = set()
    queue = [root, out]
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in edge and node.op in ("call_function", "call_method"):
            queue.extend(node.all_input_nodes)
    graph = Graph()
    env: dict[Node, Node] = {}
    inputs: list[Node] = []
    ordered = [node for node in site.graph.nodes if node in needed]
    for node in ordered:
        if node in edge or node.op not in ("call_function", "call_method"):
            env[node] = graph.placeholder(node.name)
            env[node].meta["example_value"] = value_of(node)
            inputs.append(node)
    for node in ordered:
        if node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output((env[root], env[out]))
    return graph, inputs, env[site]


def _compare(module: GraphModule, inputs: list[Node], training: bool) -> Verdict:
    values = [random_value(node) for node in inputs]
    got = _run(module, values, training)
    exact = _run(_widened(module), [_wide(v) for v in values], training)
    worst, text = 0.0, []
    for index, name in enumerate(["out", *(f"grad {i}" for i in range(len(got[0]) - 1))]):
        want, original, mine = exact[0][index], got[0][index], got[1][index]
        error, allowed = (
            relative_error(mine, want),
            TOLERANCE * relative_error(original, want) + SLACK * torch.finfo(mine.dtype).eps,
        )
        worst = max(worst, error / allowed)
        text.append(f"{name} {error:.1e} (original {relative_error(original, want):.1e})")
        if not error <= allowed:
            sentence = f"The replacement's {name} is {error:.1e} off float64, {allowed:.1e} allowed."
            return Verdict("failed: " + ", ".join(text), Rejection("verify-failed", sentence))
    return Verdict("ok: " + ", ".join(text))


def _run(module: GraphModule, values: list[Any], training: bool) -> list[list[torch.Tensor]]:
    """[[original's output, gradients…], [replacement's …]]"""
    found = []
    for index in range(2):
        leaves = [
            v.detach().clone().requires_grad_(training and v.is_floating_point())
            if isinstance(v, torch.Tensor)
            else v
            for v in values
        ]
        with torch.set_grad_enabled(training):
            out = module(*leaves)[index]
        results = [out.detach()]
        if training:
            weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=torch.float64).view(
                out.shape
            )
            wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
            grads = torch.autograd.grad(out, wanted, weights.to(out.dtype), allow_unused=True)
            results += [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
        found.append(results)
    return found


def _widened(module: GraphModule) -> GraphModule:
    """The original in float64: every floating-point dtype the code names becomes float64; the replacement is
    left out."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            original = env[node.args[0][0]]  # type: ignore[index]
            graph.output((original, original))
            break
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].args = _retyped(env[node].args)
        env[node].kwargs = _retyped(env[node].kwargs)
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            env[node].target = "double"
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)
    return GraphModule(module, graph)


def _retyped(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, tuple | list):
        items = [_retyped(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _retyped(item) for key, item in value.items()}
    return value


def random_value(node: Node) -> Any:
    """A real value like a node's fake one: normal numbers, or 0 and 1 for integers and booleans."""
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [hint(size) for size in value.shape]
    if value.is_floating_point():
        return torch.randn(sizes, device=value.device, dtype=torch.float32).to(value.dtype)
    return torch.randint(0, 2, sizes, device=value.device).to(value.dtype)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    same = torch.equal(torch.isnan(got), torch.isnan(want))
    difference = torch.nan_to_num(got.double() - want) if same else got.double() - want
    return float(difference.norm() / torch.nan_to_num(want).norm().clamp_min(1e-30))
