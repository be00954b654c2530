"""What sparse attention leaves out, what that costs each head, and how a bound on the error holds.

Two layers of attention over 4096 tokens: in the first one two heads read what is near and two look for a
passage far back, those of the second attend to everything a little. Each selector is calibrated on them; then
they run with the best one for each layer, and with a bound on the error. On a CPU everything runs on kp's
reference kernels; on a GPU on its own, and dense and sparse attention over 32k tokens are timed. With
`--validate` there are gradients, too.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kp_compiler import target as targets
from kp_compiler.calibrate import calibrate
from kp_compiler.calibration import Measured
from kp_compiler.capture import capture_reports, merged
from kp_compiler.demos import common
from kp_compiler.efficiency import attention_efficiency
from kp_compiler.report import Report

SUMMARY = (
    "blocks of attention chosen by content: what each selector keeps and loses, and a bound on the error"
)
TOKENS, HEADS, KV_HEADS, WIDTH = 4096, 4, 2, 64
BLOCK = 128
SPARSITY = (0.5, 0.7, 0.8)
ERROR = 0.1  # the bound asked for
SLACK = 1.5  # errors are bounded as 64 sampled queries show them
TIMED = 32768
NAMES = ("out", "dq", "dk", "dv")


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Model(nn.Module):
    """Attention twice over the same keys: with the queries as they are, and with very small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.searching, self.spread = Layer(), Layer()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.searching(q, k, v), self.spread(q * 0.02, k, v)


def example() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """q, k, v [1,H or K,4096,64]: each block of keys has a code, each block of queries asks for one's: its
    own or the one before in the first heads, any earlier one in the others."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    codes = normal(KV_HEADS, TOKENS // BLOCK, WIDTH)
    block = torch.arange(TOKENS) // BLOCK
    k = 0.3 * normal(1, KV_HEADS, TOKENS, WIDTH) + codes[:, block]
    near, far = codes[0, block - block % 2], codes[1, (7 * block + 3) % (block + 1)]
    asked = torch.stack([near, far]).repeat_interleave(HEADS // KV_HEADS, 0)
    q = 0.3 * normal(1, HEADS, TOKENS, WIDTH) + 2.0 * asked
    device = "cuda" if targets.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Model(), tuple(x.to(device, dtype) for x in (q, k, normal(1, KV_HEADS, TOKENS, WIDTH))), {}


def run(validate: bool) -> int:
    """Print the tables; 1 where one of them is not as it should be."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "calibration.json")
        model, inputs, _ = example()
        found = calibrate(model, [inputs], path, sparsity=SPARSITY, options=_options())
        print(_calibrated(found))
        wrong += _check_calibrated(found)
        exact = _outputs(model, inputs, validate)
        rows = [("settings", "layer", "blocks", "errors of heads, all queries")]
        for title, more in (
            ("selector 'auto', sparsity 0.7", {"selector": "auto", "sparsity": 0.7, "calibration": path}),
            (f"error={ERROR}, sparsity 0.7", {"sparsity": 0.7, "error": ERROR}),
            ("sparsity 0", {"sparsity": 0.0}),
        ):
            got, report = _compiled(model, inputs, validate, more)
            errors = [_errors(a, b) for a, b in zip(got, exact, strict=True)]
            for name, of_heads in zip(("searching", "spread"), errors, strict=False):
                site = next(s for s in report.sites if s.module == name)
                rows.append((title, name, str(site.spec), "  ".join(f"{x:.1e}" for x in of_heads)))
            wrong += _check(title, more, errors)
        print("\n" + common.table(rows))
    print("\n" + _formulas())
    if targets.is_available():
        print("\n" + _timed())
    print(
        "\n" + ("\n".join(f"NOT AS EXPECTED  {line}" for line in wrong) or "everything is within its bounds")
    )
    return 1 if wrong else 0


def _options(**more: Any) -> dict[str, Any]:
    cpu = {} if targets.is_available() else {"cpu_rewrites": True, "lowering": "aot_eager"}
    return {**cpu, "sparse_attention": {"min_tokens": 0, "sink_blocks": 0, **more}}


def _calibrated(found: dict[str, list[Measured]]) -> str:
    rows: list[tuple[str, ...]] = [
        ("layer", "selector", "sparsity", "blocks computed", "mass kept", "mean error", "worst head")
    ]
    for layer, several in found.items():
        for each in several:
            kept = each.summary()
            costs = (f"{kept[name]:.3f}" for name in ("kept_mass", "error", "worst_head_error"))
            rows.append((layer, each.selector, f"{each.sparsity:.0%}", f"{kept['density']:.1%}", *costs))
    return common.table(rows)


def _check_calibrated(found: dict[str, list[Measured]]) -> list[str]:
    """What content is for, and that no budget is overspent by more than the forced blocks."""
    by = {(m.selector, m.sparsity): m for m in found["searching"]}
    wrong = []
    for share in SPARSITY:
        mine, chance = (1 - by[name, share].summary()["kept_mass"] for name in ("content", "random"))
        if not mine < 0.7 * chance:
            wrong.append(f"at sparsity {share} content loses {mine:.3f} of the mass, chance {chance:.3f}")
        if by["content", share].density > 1 - share + 0.05:
            wrong.append(f"at sparsity {share} {by['content', share].density:.1%} of the blocks are computed")
    return wrong


def _outputs(model: Any, inputs: tuple[Tensor, ...], gradients: bool) -> list[Tensor]:
    """Both layers' outputs; with `gradients`, those of q, k and v after them."""
    leaves = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    with torch.set_grad_enabled(gradients):
        outs = model(*leaves)
    if gradients:
        sum(out.float().square().sum() for out in outs).backward()
    return [*(out.detach() for out in outs), *(x.grad for x in leaves if x.grad is not None)]


def _compiled(
    model: Any, inputs: tuple[Tensor, ...], gradients: bool, more: dict[str, Any]
) -> tuple[list[Tensor], Report]:
    with capture_reports() as reports:
        compiled = torch.compile(model, backend="kp", options=_options(mode="require", **more))
        got = _outputs(compiled, inputs, gradients)
    torch._dynamo.reset()
    return got, merged(reports)


def _errors(got: Tensor, want: Tensor) -> list[float]:
    """Relative error of each head."""
    off, norm = (x.double().square().sum((0, 2, 3)).sqrt() for x in (got - want, want))
    return (off / norm).tolist()


def _check(title: str, more: dict[str, Any], errors: list[list[float]]) -> list[str]:
    bound = 0.02 if more.get("sparsity") == 0.0 else more.get("error", float("inf")) * SLACK
    worst = max(x for of_heads in errors for x in of_heads)
    return [] if worst <= bound else [f"{title}: an error of {worst:.1e}, {bound:.1e} allowed"]


def _formulas() -> str:
    rows: list[tuple[str, ...]] = [
        ("tokens", "FLOPs, all blocks", "FLOPs, a tenth", "choosing", "saving", "FLOPs for each byte")
    ]
    for tokens in (8192, 32768, 131072):
        found = attention_efficiency(sparsity=0.9).at(B=1, H=32, K=8, S=tokens, T=tokens, D=128, E=128)
        numbers = (found.dense_flops, found.flops, found.selection_flops)
        rows.append((str(tokens), *(f"{float(x):.2e}" for x in numbers), f"{float(found.saving):.1f}x",
                     f"{float(found.intensity):.0f}"))  # fmt: skip
    return "32 heads, 8 of keys, D128, causal, by formula (kp.attention_efficiency):\n" + common.table(rows)


def _timed() -> str:
    """Median milliseconds of a forward pass."""
    inputs = [torch.randn(1, heads, TIMED, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8)]
    steps: dict[str, Callable[[], Any]] = {}
    arms = {"all blocks": None, "a tenth of them, by content": _options(sparsity=0.9)}
    for name, options in arms.items():
        compiled = torch.compile(Layer(), backend="kp", options=options)

        def step(compiled: Any = compiled) -> None:
            with torch.no_grad():
                compiled(*inputs)

        steps[name] = step
    times = common.medians(steps)
    rows = [(f"{TIMED} tokens, 32 heads, D128", "ms"), *((name, f"{ms:.2f}") for name, ms in times.items())]
    return common.table(rows)
