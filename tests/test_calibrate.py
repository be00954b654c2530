"""Measuring a model's own attention: `kp.calibrate`, `kp.train_selectors`, and what reads their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kp_compiler as kp
from kp_compiler import calibration, gates
from kp_compiler.calibration import Measured
from kp_compiler.errors import KPConfigError, KPError
from tests.test_sparse_attention import EAGER, biased, causal, run

LENGTH = 1400  # eleven blocks
OPTIONS = {**EAGER, "sparse_attention": {"min_tokens": 0, "local_blocks": 1, "sink_blocks": 0}}


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v)


class Model(nn.Module):
    """The second layer looks for what the first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.second(self.first(q, k, v) + q, k, v)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Queries of every block look for one earlier block, by the sign of a few features."""
    q, k, v = (torch.randn(1, h, LENGTH, 16) for h in (2, 2, 2))
    codes = torch.randn(11, 16) * 2.5
    block = torch.arange(LENGTH) // 128
    k += codes[block]
    q += codes[(block * 7 + 3) % (block + 1)] * 1.5
    return q, k, v


def settings(**more: Any) -> dict[str, Any]:
    return {**OPTIONS, "sparse_attention": {**OPTIONS["sparse_attention"], "mode": "require", **more}}


def test_calibration_and_auto(tmp_path: Path) -> None:
    path = str(tmp_path / "calibration.json")
    model, data = Model(), [batch(), batch()]
    found = kp.calibrate(model, data, path, sparsity=(0.5, 0.7), options=OPTIONS)
    assert sorted(found) == ["first", "second"] and calibration.load(path) == found
    first = {(m.selector, m.sparsity): m for m in found["first"]}
    assert len(first) == 8 and all(len(m.mass) == len(m.error) == 2 for m in first.values())
    for m in first.values():
        assert 0 < m.density <= 1 - m.sparsity + 0.1 and m.tokens == LENGTH
        assert all(0 < x <= 1 for x in m.mass) and all(0 <= x < 3 for x in m.error)
    assert min(first["content", 0.7].mass) > max(first["random", 0.7].mass)
    assert max(first["content", 0.5].error) < min(first["random", 0.5].error)

    _, report = run(model, list(data[0]), settings(selector="auto", sparsity=0.7, calibration=path))
    for site in report.sites:
        best = min((m for m in found[site.module] if m.sparsity == 0.7), key=lambda m: sum(m.error))
        assert f"{best.selector}, 30% of blocks" in str(site.spec)
        assert site.predicted["calibration"]["kept_mass"] == pytest.approx(sum(best.mass) / 2, abs=1e-4)
    assert "worst_head_error" in report.why("first")
    _, report = run(model, list(data[0]), settings(selector="auto", error=0.0, calibration=path))
    assert all("2 heads dense" in str(site.spec) for site in report.sites)
    _, report = run(model, list(data[0]), settings(sparsity=0.5, calibration=path))
    assert report.sites[0].predicted["calibration"]["density"] == round(first["content", 0.5].density, 4)
    _, report = run(model, list(data[0]), settings(sparsity=0.5, calibration=path, sink_blocks=1))
    assert report.sites[0].predicted is None  # nothing measured of that
    with pytest.raises(Exception, match=r"measured only at sparsity \[0.5, 0.7\], not 0.6"):
        run(model, list(data[0]), settings(selector="auto", sparsity=0.6, calibration=path))


def test_learned(tmp_path: Path) -> None:
    """Gates that were trained hold more of the attention than chance and than untrained ones."""
    path = str(tmp_path / "gates.safetensors")
    torch.manual_seed(1)
    model, one = Model(), batch()
    losses = kp.train_selectors(model, [one], path, rank=8, steps=150, options=OPTIONS)
    assert sorted(losses) == ["first", "second"] and losses["first"] < 0.3
    again = kp.train_selectors(model, [one], path, rank=8, steps=150, options=OPTIONS)
    assert again == losses
    trained = gates.load(path)["first"]
    assert [tuple(x.shape) for x in trained] == [(2, 16, 8), (2, 48, 8)]
    (mine, report), (other, _) = (
        run(Layer(), list(one), settings(sparsity=0.7, **more))
        for more in ({"selector": "learned", "gates": _renamed(path)}, {"selector": "random"})
    )
    assert "learned, 30% of blocks" in str(report.sites[0].spec)
    off, chance = ((x[0] - causal(*one))[:, :, 768:].norm() for x in (mine, other))  # two blocks and more
    assert off < 0.5 * chance
    options = {**settings(selector="learned", gates=path, mass=0.9), "verify": True}
    _, report = run(model, list(one), options)
    assert all("learned, 90% of mass" in str(site.spec) for site in report.sites)
    assert all(str(site.verified).startswith("ok") for site in report.sites)
    planned = kp.plan(model, *one, target="cuda:sm90", dtype=torch.bfloat16, options=_asked(options))
    assert all("learned, 90% of mass" in str(site.spec) for site in planned.sites)
    with pytest.raises(Exception, match=r"untrained|has no gates"):
        run(causal, list(one), settings(selector="learned", gates=path))


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    return {"sparse_attention": options["sparse_attention"]}


def _renamed(path: str) -> str:
    """The first layer's gates for a model that is that layer."""
    other = path.replace("gates", "one")
    gates.save({"": gates.load(path)["first"]}, other)
    return other


def test_gates_of_another_model(tmp_path: Path) -> None:
    path = str(tmp_path / "gates.safetensors")
    gates.save({"first": (torch.randn(2, 8, 4), torch.randn(2, 24, 4))}, path)
    with pytest.raises(Exception, match="are not those of"):
        run(Model(), list(batch()), settings(selector="learned", gates=path))


def test_best() -> None:
    def one(name: str, sparsity: float, error: tuple[float, ...]) -> Measured:
        return Measured(name, "pooled", sparsity, 1 - sparsity, (0.9,) * len(error), error, 100)

    known = [one("a", 0.5, (0.01, 0.02)), one("a", 0.9, (0.01, 0.2)), one("b", 0.9, (0.05, 0.06))]
    assert calibration.best(known, 0.5, None) is known[0]
    assert calibration.best(known, 0.9, 0.1) is known[2]
    assert calibration.best(known, None, 0.04) is known[0]  # 0.5 of two heads, 0.9 of one
    assert calibration.best(known, None, 0.1) is known[2]
    assert calibration.best(known, None, None) is known[2]
    assert calibration.best(known, 0.7, None) is None and calibration.best([], None, 0.1) is None


def test_bad_files_and_arguments(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    for text in ("{", "[]", json.dumps({"schema": 1, "sites": {"a": [{"selector": "x"}]}})):
        wrong.write_text(text)
        with pytest.raises(KPConfigError, match=r"is no file that kp\.calibrate wrote"):
            calibration.load(str(wrong))
    wrong.write_text(json.dumps({"schema": 7, "sites": {}}))
    with pytest.raises(KPConfigError, match="schema 7"):
        calibration.load(str(wrong))
    for load in (calibration.load, gates.load):
        with pytest.raises(KPConfigError, match="can't be read"):
            load(str(tmp_path / "none"))
    with pytest.raises(KPConfigError, match=r"is no file that kp\.train_selectors wrote"):
        gates.load(str(wrong))
    for selector, needed in (("auto", "calibration="), ("learned", "gates=")):
        with pytest.raises(KPConfigError, match=needed):
            kp.explain(causal, *batch(), options=settings(selector=selector))
    path = tmp_path / "out.json"
    for more in ({"selectors": ["learned"]}, {"sparsity": [1.0]}):
        with pytest.raises(KPConfigError, match=r"selectors|sparsity"):
            kp.calibrate(Model(), [batch()], path, options=OPTIONS, **more)
    with pytest.raises(KPConfigError, match="rank: got 0"):
        kp.train_selectors(Model(), [batch()], path, rank=0, options=OPTIONS)
    with pytest.raises(KPError, match="no batch was given"):
        kp.calibrate(Model(), [], path, options=OPTIONS)
    with pytest.raises(KPError, match="fewer than 8192"):
        kp.calibrate(Model(), [batch()], path, options=EAGER)
    assert not path.exists()
    for make in (kp.calibrate, kp.train_selectors):
        with pytest.raises(KPConfigError, match="can't be written"):
            make(Model(), [batch()], tmp_path / "none" / "file", options=OPTIONS)


def test_several_sites_of_a_module(tmp_path: Path) -> None:
    """Each is measured for itself; scores with a bias are not measured."""

    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v)[:, :1] + causal(q[:, :1], k[:, :1], v[:, :1])

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Both()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.layer(q, k, v)

    path = str(tmp_path / "calibration.json")
    found = kp.calibrate(Outer(), [batch()], path, sparsity=(0.5,), selectors=["content"], options=OPTIONS)
    assert {name: len(several[0].mass) for name, several in found.items()} == {"layer": 2, "layer#1": 1}
    with pytest.raises(KPError, match="bias"):
        kp.calibrate(biased, [batch()], path, options=OPTIONS)
