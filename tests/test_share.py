"""Rewriting a graph for a sequence that ranks share: what becomes of sites and positions, and what is an
error. What it computes: tests/distributed/test_context_parallel.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from kp_compiler import sharding
from kp_compiler.config import Config, ContextParallelConfig, Ranks, resolve
from kp_compiler.errors import KPConfigError, KPError
from kp_compiler.lowering import ring
from kp_compiler.metadata import bodies
from kp_compiler.passes import ALL_PASSES
from kp_compiler.passes.base import Context
from kp_compiler.passes.context_parallel import ContextParallel
from kp_compiler.pipeline import Run, run
from kp_compiler.report import Rejection, Report
from kp_compiler.target import Target
from tests.test_sequence import DIM, TOKENS, Block, _Stop, _stop, traced

RANKS = Ranks("some group", rank=1, size=4, device="cuda")


def share(gm: GraphModule, schedule: Any = "ring", layout: Any = "zigzag", ranks: Ranks = RANKS) -> set[str]:
    """What the pass makes of a graph whose sites are recognised; the schedules that it chose."""
    settings = ContextParallelConfig(mode="on", mesh=ranks, schedule=schedule, layout=layout)
    each, program, chosen = ContextParallel(), {}, set()
    for unit, calls in bodies(gm):
        ctx = Context(unit, Config(context_parallel=settings), Target("cuda", 90), calls, program=program)
        assert each.applies(ctx) is None
        for site in list(each.sites(unit.graph)):
            match = each.inspect(site, ctx)
            chosen.add(match.impl)
            each.rewrite(unit.graph, match, ctx)
        unit.graph.lint()
    return chosen


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    bias = (index - index[:, None]).to(q.dtype) * 0.1
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(index > index[:, None], -torch.inf))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.rand(q.shape[2], q.shape[2]) > 0.5)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def qkv(heads: int = 4) -> list[Tensor]:
    return [torch.randn(2, heads, TOKENS, 8) for _ in range(3)]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_sites_and_positions(layout: Any) -> None:
    gm, _ = traced(Block(), torch.randn(2, TOKENS, DIM))
    assert share(gm, "allgather", layout) == {"allgather"}
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(ring.context_attention()) == 1
    assert not any("kp.attention" in str(target) for target in targets)
    (index,) = gm.graph.find_nodes(op="call_function", target=torch.arange)
    users = {user.target for user in index.users}
    assert users == ({torch.add, torch.lt} if layout == "zigzag" else {torch.add})


@pytest.mark.parametrize(
    ("function", "arguments", "code"),
    [
        (biased, qkv(), "mixes-tokens|bias"), (masked, qkv(), "mask-unproved"), (dropped, qkv(), "dropout"),
        (Block("shift"), [torch.randn(2, TOKENS, DIM)], "mixes-tokens"),
        (torch.sin, [torch.randn(3)], "no-site"),
        (renormalised, qkv(), "attention site.*Not recognised: .*normalised again"),
    ],
)  # fmt: skip
def test_what_is_an_error(function: Any, arguments: list[Tensor], code: str) -> None:
    gm, _ = traced(function, *arguments)
    with pytest.raises(KPError, match=f"the sequence can't be shared.*({code})"):
        share(gm)


def test_heads_that_can_t_be_divided() -> None:
    gm, _ = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(6))
    with pytest.raises(KPError, match="6 heads can't be divided among 4 ranks"):
        share(gm, "ulysses")
    assert share(gm, "auto") <= {"ring", "allgather"}


def test_grids() -> None:
    """Rows of a mesh share heads, which have to be as many as they divide; other meshes have no rows."""
    grid = dataclasses.replace(RANKS, grid=("column", "row"), row=2)
    gm, _ = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(6))
    with pytest.raises(KPError, match="hybrid needs a mesh of two dimensions"):
        share(gm, "hybrid")
    assert share(gm, "hybrid", ranks=grid) == {"hybrid"}
    (node,) = gm.graph.find_nodes(op="call_function", target=ring.context_attention())
    plan = ring.Plan.parse(node.args[-1])
    assert (plan.grid, plan.group) == (("column", "row"), RANKS.group)
    gm, _ = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(5))
    with pytest.raises(KPError, match="5 heads can't be divided among 2 ranks"):
        share(gm, "hybrid", ranks=grid)


class Checkpointed(nn.Module):
    """Two blocks whose activations are recomputed, with a mask of documents that is made around them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(64, DIM)
        self.blocks = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))

    def block(self, qkv: nn.Linear, x: Tensor, documents: Tensor) -> Tensor:
        index = torch.arange(x.shape[1], device=x.device)
        mask = (documents[:, None, :, None] == documents[:, None, None]) & (index <= index[:, None])
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        for qkv in self.blocks:
            x = checkpoint(self.block, qkv, x, documents, use_reentrant=False)
        return x


def test_bodies_of_checkpoints() -> None:
    """Positions around them, sites in them, and vectors of masks that are made whole once and handed in."""
    documents = torch.arange(TOKENS).expand(2, -1) // 7
    gm, found = traced(Checkpointed(), torch.randn(2, TOKENS, DIM), documents)
    assert not isinstance(found, Rejection), found
    share(gm)
    top, *inner = (unit.graph for unit, _ in bodies(gm))
    assert len(inner) == 2
    assert len(top.find_nodes(op="call_function", target=ring.gather_sequence())) == 1
    for graph in inner:
        assert len(graph.find_nodes(op="call_function", target=ring.context_attention())) == 1
        assert not graph.find_nodes(op="call_function", target=ring.gather_sequence())


# ---------------------------------------------------------------------------------------------------------
# the whole pipeline


def config(settings: dict[str, Any] | None = None, **others: Any) -> Config:
    shared = ContextParallelConfig(**{"mode": "on", "mesh": RANKS, **(settings or {})})
    return dataclasses.replace(resolve(others, env={}), context_parallel=shared)


def run_pipeline(
    function: Any, arguments: list[Tensor], config: Config, *, plan_only: bool = False
) -> Report:
    """Raises what the pipeline raises."""
    found: list[Any] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        try:
            found.append(run(Run(gm, config, Target("cuda", 90, has_triton=True), plan_only=plan_only)))
        except KPError as error:
            found.append(error)
        return _stop

    torch._dynamo.reset()
    with pytest.raises(_Stop):
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    if isinstance(found[0], KPError):
        raise found[0]
    return found[0]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, index <= index[:, None])


def test_report() -> None:
    """What each schedule is predicted to take, and by which one the site is computed; attention that has to
    fire has fired."""
    report = run_pipeline(causal, qkv(), config(attention="require"))
    (site,) = report.sites
    assert site.status == "rewritten"
    assert site.impl in ("ring", "allgather", "ulysses")
    assert set(site.predicted or {}) == {"ring", "allgather", "ulysses"}
    assert all(each["forward_ms"] > 0 for each in site.predicted.values())


def test_plans_name_each_site_once() -> None:
    (site,) = run_pipeline(causal, qkv(), config(), plan_only=True).sites
    assert site.pass_name == "context_parallel"


def test_memory_bounds_the_choice() -> None:
    site = run_pipeline(causal, qkv(), config({"memory": 1e-9})).sites[0]
    assert [note.code for note in site.notes] == ["memory"]
    least = min(site.predicted.values(), key=lambda each: each["memory_mib"])
    assert site.predicted[site.impl] == least


def test_failing_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be undone: attention would be within parts of the sequence."""

    def raising(*_: Any) -> Any:
        raise ZeroDivisionError("a bug in a pass")

    monkeypatch.setattr(ContextParallel, "rewrite", raising)
    with pytest.raises(KPError, match="context_parallel failed: ZeroDivisionError: a bug in a pass"):
        run_pipeline(causal, qkv(), config())


@pytest.mark.parametrize("missing", ["raise_attention", "prove_masks"])
def test_earlier_pass_that_fails_is_an_error(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> Any:
        raise ZeroDivisionError("a bug in a pass")

    (each,) = (each for each in ALL_PASSES if each.name == missing)
    monkeypatch.setattr(each, "inspect", raising)
    with pytest.raises(KPError, match="the sequence can't be shared"):
        run_pipeline(masked_causal, qkv(), config())


def test_one_rank_has_everything() -> None:
    alone = Ranks("some group", 0, 1, "cuda")
    report = run_pipeline(causal, qkv(), config({"mesh": alone}))
    assert [site.impl for site in report.sites] != ["ring"]
    assert [note.code for note in report.sites[0].notes] == ["one-rank"]


def test_mesh_of_other_devices() -> None:
    with pytest.raises(KPError, match="mesh is one of cpu devices, the model is on cuda"):
        run_pipeline(causal, qkv(), config({"mesh": dataclasses.replace(RANKS, device="cpu")}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel": True}, "context_parallel: needs mesh="),
        ({"ring_attention": {"layout": "zigzag"}}, "ring_attention: needs mesh="),
        ({"context_parallel": {"mesh": 3}}, "context_parallel.mesh: torch.distributed is not initialised"),
        ({"context_parallel": {"schedule": "rings"}}, "did you mean 'ring'"),
        ({"ring_attention": {"schedule": "ring"}}, "unknown ring_attention setting 'schedule'"),
        ({"context_parallel": {"memory": 0}}, "context_parallel.memory: got 0, expected GiB"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KPConfigError, match=message):
        resolve(options, env={})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"skip": ("a",)}, "skip and only would leave attention within parts"),
        (
            {"sparse_attention": "on", "schedule": "ring"},
            "can't be used together with sparse_attention, but by",
        ),
        ({"sparse_attention": {"dense_heads": {"": [1]}}}, "together with sparse_attention.dense_heads"),
        ({"ring_attention": {"mesh": RANKS}}, "can't be used together with context_parallel"),
        ({"raise_attention": "off"}, "required, but raise_attention"),
        ({"prove_masks": "off"}, "required, but prove_masks"),
    ],
)
def test_what_does_not_go_together(
    others: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "ranks_of", lambda mesh, name="": mesh)
    mine = {"mesh": RANKS, **{name: others.pop(name) for name in ("skip", "schedule") if name in others}}
    with pytest.raises(KPConfigError, match=message):
        resolve({"context_parallel": mine, **others}, env={})


def test_kp_can_t_be_disabled_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KPConfigError, match="KP_DISABLE: context_parallel is on"):
        resolve({"context_parallel": {"mesh": 3}}, env={"KP_DISABLE": "1"})
    for off in ("off", False, {"mode": "off"}):
        assert resolve({"context_parallel": off}, env={"KP_DISABLE": "1"}).disabled
