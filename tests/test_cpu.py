"""CPU graphs: handed on as they came, with a report that says so, and eagerly where nothing can compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kp_compiler
from kp_compiler import target as targets
from kp_compiler.capture import merged
from kp_compiler.lowering import inductor


def attend(q, k, v):
    line = torch.arange(q.shape[2])
    scores = (q @ k.transpose(-2, -1)).masked_fill(line[None, :] > line[:, None], float("-inf"))
    return F.softmax(scores, dim=-1) @ v


def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, 4, 24, 16, requires_grad=True) for _ in range(3)]


def listing(gm: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs), sorted(n.meta)) for n in gm.graph.nodes]


@pytest.mark.parametrize(
    "options", [{}, {"attention": "on"}, {"lowering": "aot_eager"}, {"lowering": "eager"}], ids=str
)
def test_graph_is_handed_on_node_for_node(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[Any, ...]]] = []

    def look(gm: Any, example_inputs: Any, config: Any, *, guarded: bool) -> Any:
        seen.append(listing(gm))
        assert guarded is False
        return gm.forward

    monkeypatch.setattr(inductor, "lower", look)

    def spy(gm: Any, example_inputs: Any) -> Any:
        before = listing(gm)
        result = kp_compiler.kp(gm, example_inputs, options=options)
        assert seen == [before]
        assert listing(gm) == before
        return result

    with kp_compiler.capture_reports() as reports:
        inputs = qkv()
        torch.testing.assert_close(
            torch.compile(attend, backend=spy, fullgraph=True)(*inputs), attend(*inputs)
        )
    report = merged(reports)
    assert not report.sites
    assert [graph.mode for graph in report.graphs] == ["cpu"]
    assert "cpu" in report.table()
    assert "cpu_rewrites" in report.table()


def test_without_a_compiler_it_runs_eagerly_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "cpp_compiler", lambda: None)
    inputs = qkv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = torch.compile(attend, backend="kp")(*inputs)
        got.sum().backward()
    assert [str(w.message) for w in caught if "C++" in str(w.message)] == [
        str(w.message) for w in caught if "kp:" in str(w.message)
    ]
    assert len([w for w in caught if "kp:" in str(w.message)]) == 1
    torch.testing.assert_close(got, attend(*inputs))
    assert all(x.grad is not None for x in inputs)


def test_without_a_compiler_rewritten_graphs_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu_rewrites` with the default lowering needs no compiler either: the rewritten graph runs eagerly."""
    monkeypatch.setattr(targets, "cpp_compiler", lambda: None)
    called = []
    monkeypatch.setattr(inductor, "compile_with_inductor", lambda *a, **k: called.append(1))
    inputs = qkv()
    with warnings.catch_warnings(record=True) as caught, kp_compiler.capture_reports() as reports:
        warnings.simplefilter("always")
        got = torch.compile(attend, backend="kp", options={"cpu_rewrites": True})(*inputs)
    assert not called
    assert len([w for w in caught if "kp:" in str(w.message)]) == 1
    assert len(merged(reports).rewritten()) == 1
    torch.testing.assert_close(got, attend(*inputs))


@pytest.mark.inductor
def test_default_options_compile_on_a_cpu() -> None:
    inputs = qkv()
    with kp_compiler.capture_reports() as reports, torch.no_grad():
        got = torch.compile(attend, backend="kp")(*inputs)
    torch.testing.assert_close(got, attend(*inputs))
    assert [report.target for report in reports] == ["cpu"]


def test_twin_with_cpu_rewrites_is_rewritten() -> None:
    with kp_compiler.capture_reports() as reports:
        options = {"cpu_rewrites": True, "lowering": "aot_eager"}
        inputs = qkv()
        torch.testing.assert_close(
            torch.compile(attend, backend="kp", options=options)(*inputs), attend(*inputs)
        )
    (site,) = merged(reports).sites
    assert (site.status, site.impl, site.spec) == ("rewritten", "reference", "causal")
