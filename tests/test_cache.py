"""Cache keys: kp's sources and options are part of what AOTAutograd's and Inductor's caches see."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kp_compiler.config import resolve
from kp_compiler.lowering import fingerprint as fingerprints
from kp_compiler.lowering import graph_passes
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.ops import parse_spec
from tests.helpers import captured_graphs

ROOT = Path(__file__).resolve().parent.parent


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fingerprint is taken of a copy of the sources, which a test may edit."""
    for folder in ("kp_compiler", "passes", "lowering"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    places = {
        "kp_compiler": tmp_path / "kp_compiler",
        "kp_compiler.passes": tmp_path / "passes",
        "kp_compiler.lowering": tmp_path / "lowering",
    }
    monkeypatch.setattr(fingerprints, "_folders", lambda package: [places[package]])
    fingerprint.cache_clear()
    yield tmp_path
    fingerprint.cache_clear()


def fresh() -> str:
    fingerprint.cache_clear()
    return fingerprint()


def test_lowered_operator_carries_the_fingerprint() -> None:
    (graph,) = captured_graphs(attend, *(torch.randn(2, 4, 24, 16) for _ in range(3)))
    (call,) = [n for n in graph.graph.nodes if "kp.reference_attention" in str(n.target)]
    assert f'"fingerprint":"{fingerprint()}"' in call.args[5]
    assert parse_spec(call.args[5]).mask.kind == "causal"


@pytest.mark.parametrize("name", ["kp_compiler/specs.py", "passes/mask_rules.py", "lowering/reference.py"])
def test_every_byte_of_the_sources_counts(copied_sources: Path, name: str) -> None:
    before = fresh()
    assert fresh() == before
    path = copied_sources / name
    source = bytearray(path.read_bytes())
    source[len(source) // 2] ^= 1
    path.write_bytes(bytes(source))
    assert fresh() != before


def test_new_renamed_and_missing_files_count(copied_sources: Path) -> None:
    seen = {fresh()}
    (copied_sources / "passes" / "another.py").write_text("x = 1\n")
    seen.add(fresh())
    (copied_sources / "passes" / "another.py").rename(copied_sources / "passes" / "renamed.py")
    seen.add(fresh())
    (copied_sources / "lowering" / "aten.py").unlink()
    seen.add(fresh())
    assert len(seen) == 4


def test_code_that_moves_between_files_counts(copied_sources: Path) -> None:
    """Two files whose names and contents run together the same are still two other files."""
    folder = copied_sources / "passes"
    (folder / "zz1.py").write_text("a")
    (folder / "zz2.py").write_text("b")
    before = fresh()
    (folder / "zz1.py").write_text("azz2.pyb")
    (folder / "zz2.py").unlink()
    assert fresh() != before


def keys(options: dict[str, Any]) -> list[Any]:
    config = resolve(options, env={})
    return [cls(None, config).uuid() for cls in (graph_passes.Barrier, graph_passes.Unbarrier)]


def test_uuid_of_kps_inductor_passes(copied_sources: Path) -> None:
    base = keys({})
    assert len(set(base)) == 2
    assert keys({}) == base
    for options in ({"attention": "on"}, {"prove_masks": {"fill_threshold": -1e7}}, {"strict": True}):
        assert not set(keys(options)) & set(base)
    with open(copied_sources / "lowering" / "inductor.py", "a") as file:
        file.write("# changed\n")
    fresh()
    assert not set(keys({})) & set(base)


class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, key: Any) -> None:
        self.key = key

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> Any:
        return self.key


def test_users_pass_is_part_of_the_key() -> None:
    config = resolve({}, env={})
    one, other = (graph_passes.Barrier(Theirs(key), config).uuid() for key in ("one", "other"))
    assert one != other
    assert graph_passes.Barrier(Theirs(None), config).uuid() is None, "a pass without a key forbids caching"
    assert graph_passes.Barrier(lambda graph: None, config).uuid() is None
