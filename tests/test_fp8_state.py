"""Delayed scaling: its scales follow the data, and its state survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kp_compiler
from kp_compiler.lowering.fp8.quantize import sqnr
from tests.fp8 import Gated, K, M, N, Weight, compiled, fp8, train
from tests.helpers import REFERENCE


def delayed(model: nn.Module, **settings: Any) -> Any:
    options = {**REFERENCE, **fp8("delayed", **{"amax_history": 4, **settings})}
    return torch.compile(model, backend="kp", fullgraph=True, options=options)


def worst(run: Any, model: nn.Module, x: torch.Tensor) -> float:
    return min(sqnr(a, b) for a, b in zip(train(run, x), train(model, x), strict=True))


def test_delayed_scales_follow_the_data() -> None:
    """The history holds what each step saw, oldest first; a jump by four saturates once and is counted."""
    torch.manual_seed(0)
    model = Gated()
    run = delayed(model)
    x = torch.randn(M, K)
    for _ in range(3):
        good = worst(run, model, x)
    assert good > 18
    state = kp_compiler.state_dict(run)
    assert set(state) == {
        f"{name}.weight.fp8_{what}"
        for name in ("gate", "down")
        for what in ("amax_history", "amax", "overflows")
    }
    assert state["gate.weight.fp8_amax"][0] == x.abs().max()
    assert state["gate.weight.fp8_amax"][1] == max(w.weight.abs().max() for w in (model.gate, model.up))
    assert not any(state[f"{name}.weight.fp8_overflows"].any() for name in ("gate", "down"))
    train(run, 8 * x)
    assert worst(run, model, 8 * x) > 18
    assert kp_compiler.state_dict(run)["gate.weight.fp8_overflows"].tolist()[:2] == [1, 0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_values_are_counted_and_forgotten(value: float) -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    run = delayed(model)
    for _ in range(2):
        train(run, x)
    bad = x.clone()
    bad[3, 4] = value
    out, *_ = train(run, bad)
    assert not torch.isfinite(out[3]).any()
    assert worst(run, model, x) > 18
    assert kp_compiler.state_dict(run)["gate.weight.fp8_overflows"][0] == 1


def test_state_survives_recompilation_and_a_restart() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    run = delayed(model)
    for _ in range(3):
        train(run, x)
    before = kp_compiler.state_dict(run)
    train(run, torch.randn(M + 9, K))  # another length: another graph, the same state
    after = kp_compiler.state_dict(run)
    assert torch.equal(after["gate.weight.fp8_amax_history"][-1], before["gate.weight.fp8_amax"])
    other = Gated()
    other.load_state_dict(model.state_dict())
    again = delayed(other)
    kp_compiler.load_state_dict(again, after)  # before its first call
    assert all(torch.equal(kp_compiler.state_dict(again)[name], value) for name, value in after.items())
    assert all(torch.equal(a, b) for a, b in zip(train(run, x), train(again, x), strict=True))
    moved = kp_compiler.state_dict(again)
    assert torch.equal(moved["gate.weight.fp8_amax_history"][-1], after["gate.weight.fp8_amax"])
    kp_compiler.load_state_dict(again, before)  # and after it
    kp_compiler.load_state_dict(run, before)
    assert all(torch.equal(a, b) for a, b in zip(train(run, x), train(again, x), strict=True))


def test_two_models_have_states_of_their_own() -> None:
    torch.manual_seed(0)
    first, second = Gated(), Gated()
    runs = [delayed(first), delayed(second)]
    for _ in range(2):
        for run, size in zip(runs, (1.0, 100.0), strict=True):
            train(run, size * torch.ones(M, K))
    seen = [float(kp_compiler.state_dict(run)["gate.weight.fp8_amax"][0]) for run in runs]
    assert seen == [1.0, 100.0]


def test_state_of_a_checkpointed_body() -> None:
    """Recomputing the forward pass does not count a step twice."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = Gated()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    run = delayed(Checkpointed())
    inputs = [torch.randn(M, K) for _ in range(3)]
    for x in inputs:
        train(run, x)
    state = kp_compiler.state_dict(run)
    history = state["inner.gate.weight.fp8_amax_history"][:, 0]
    assert history[-2:].tolist() == [float(x.abs().max()) for x in inputs[:2]]
    assert state["inner.gate.weight.fp8_amax"][0] == inputs[2].abs().max()


def test_load_state_dict_says_what_is_wrong() -> None:
    model = Gated()
    with pytest.raises(KeyError, match=r"nothing\.weight"):
        kp_compiler.load_state_dict(model, {"nothing.weight.fp8_amax": torch.zeros(3)})
    with pytest.raises(KeyError, match="incomplete"):
        kp_compiler.load_state_dict(model, {"gate.weight.fp8_amax": torch.zeros(3)})


def test_computed_weights_have_no_state() -> None:
    module = Weight(lambda x, w, b: F.linear(x, w * 2), torch.randn(N, K))
    x = torch.randn(M, K, requires_grad=True)
    _, report = compiled(module, (x,), **fp8("delayed"))
    assert [site.reason.code for site in report.sites] == ["no-parameter"]


@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.parametrize("length", [1, 4])
def test_passes_overlap(lowering: str, length: int) -> None:
    """All forward passes of a step may come before its backward passes; the largest of all is remembered."""
    torch.manual_seed(0)
    model = Gated()
    options = {**REFERENCE, "lowering": lowering, **fp8("delayed", amax_history=length)}
    run = torch.compile(model, backend="kp", fullgraph=True, options=options)
    x = torch.randn(M, K)
    for _ in range(2):
        outs = [run(x * size) for size in (1.0, 2.0)]
        for size, out in zip((3.0, 1.0), outs, strict=True):
            (out * size).sum().backward()
    state = kp_compiler.state_dict(run)
    assert state["gate.weight.fp8_amax"][0] == 2 * x.abs().max()
    assert state["down.weight.fp8_amax"][2] == 3.0
    model.zero_grad()
    assert worst(run, model, x) > 18


def test_passes_without_gradients_forget_none() -> None:
    """Forward passes alone see no dy: what the history knows of it stays."""
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(M, K)
    run = delayed(model)
    train(run, x, scale=100.0)
    for _ in range(6):
        run(x.clone().requires_grad_())
    assert kp_compiler.state_dict(run)["down.weight.fp8_amax_history"][:, 2].max() == 100.0


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spiky, self.calm = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spiky(x) + self.calm(x.clamp(-4, 4))


def test_layers_with_spikes_have_another_recipe() -> None:
    """A value of 1e5 times the rest coarsens all rows of a delayed activation, and only its own in others."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(M, K)
    x[3, 5] = 1e5
    rest = [row for row in range(M) if row != 3]
    with torch.no_grad():
        want = model(x)[rest]
    found = {}
    for recipe in ("delayed", "rowwise", "blockwise"):
        torch._dynamo.reset()
        run = delayed(model, recipes={"spiky": recipe})
        outs = [train(run, x)[0] for _ in range(3)]  # the first one does not know of it yet
        found[recipe] = sqnr(outs[-1][rest], want)
    assert found["delayed"] < 20
    assert min(found["rowwise"], found["blockwise"]) >= 27
