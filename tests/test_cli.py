"""The command line: what each command prints at least, and exit code 2 with one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kp_compiler import cli
from kp_compiler.demos import DEMOS

JOB = """
import torch
import torch.nn.functional as F


class Block(torch.nn.Module):
    def forward(self, q, k, v):
        line = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=line[None, :] <= line[:, None])


def build():
    return Block(), tuple(torch.randn(1, 4, 256, 64) for _ in range(3)), {}


def broken():
    raise ValueError("no model today")


def wrong():
    return 3
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "kp_cli_job.py"
    path.write_text(JOB)
    return str(path)


def test_plan(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["plan", f"{job}:build", "--target", "cuda:sm90", "--dtype", "bfloat16", "--no-grad"]) == 0
    )
    text = capsys.readouterr().out
    assert "cudnn" in text
    assert "causal" in text
    assert (
        cli.main(["plan", f"{job}:build", "--json", "--dtype", "bfloat16", "--option", "attention.impl=flex"])
        == 0
    )
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert (site["impl"], site["spec"]) == ("flex", "causal")


def test_explain(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "explain",
        f"{job}:build",
        "--option",
        "cpu_rewrites=true",
        "--option",
        "lowering=aot_eager",
        "--no-grad",
    ]
    assert cli.main([*arguments, "--why", "kp_cli_job.py"]) == 0
    assert "reference" in capsys.readouterr().out
    assert cli.main([*arguments, "--diff", "attention"]) == 0
    assert "+" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "attention", "prove_masks", "cudnn"):
        assert word in text
    assert cli.main(["doctor", "--target", "cuda:sm90"]) == 0
    assert "sm90" in capsys.readouterr().out


def test_demo_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in DEMOS)


BAD = [
    ["plan", "nowhere.py:build"],
    ["plan", "{job}:missing"],
    ["plan", "{job}:broken"],
    ["plan", "{job}:wrong"],
    ["plan", "{job}"],
    ["plan", "{job}:build", "--target", "cuda:h100"],
    ["plan", "{job}:build", "--option", "attentoin=on"],
    ["plan", "{job}:build", "--option", "attention"],
    ["plan", "{job}:build", "--options", "{{"],
    ["plan", "{job}:build", "--why", "no.such.module"],
    ["explain", "{job}:build", "--diff", "fp8"],
    ["demo", "no-such-demo"],
    ["doctor", "--distributed"],
    ["doctor", "--target", "tpu"],
]


@pytest.mark.parametrize("arguments", BAD, ids=lambda a: " ".join(a)[:40])
def test_bad_input(arguments: list[str], job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([a.format(job=job) for a in arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("kp: error: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["paln"], ["plan"], ["plan", "x:y", "--dtype", "int3"]], ids=str)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
