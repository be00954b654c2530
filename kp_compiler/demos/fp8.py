"""Training a small Llama in FP8 beside the same model in bfloat16, and what is planned for a large one.

The model of random weights learns to count in steps of seven. On a CPU the products are emulated: the losses
are those of FP8, the times are not. With a GPU, layers of Llama-8B's shape are timed against Inductor too.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch

from kp_compiler.capture import capture_reports, merged, plan
from kp_compiler.demos import common
from kp_compiler.target import is_available

SUMMARY = "losses of a small Llama trained in each FP8 recipe beside bfloat16, and the plan for a large one"
RECIPES = ("tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise")
QUICK = ("tensorwise", "delayed")
STEPS = 30
TOLERANCE = 0.02  # how far the last loss may be off bfloat16's, in parts of what bfloat16 learned
_SIZES = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128, "use_cache": False,
}  # fmt: skip
_LARGE = {
    "vocab_size": 512, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "use_cache": False,
}  # fmt: skip
_LARGE_TOKENS = 8192


def _model(sizes: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    package = common.transformers()
    config = package.LlamaConfig(**sizes, attn_implementation="sdpa")
    return common.build(package.LlamaForCausalLM, config, device=device, dtype=dtype)


def _batch(step: int, device: str) -> torch.Tensor:
    """Rows that count in steps of seven, from somewhere."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 512, (8, 1), generator=generator)
    return ((starts + 7 * torch.arange(32)) % 512).to(device)


def _losses(run: Any, model: Any, device: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = []
    for step in range(STEPS):
        ids = _batch(step, device)
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(float(loss.detach()))
    return found


def example() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The small model, for `kp plan fp8 --option fp8_linear=on`."""
    return _model(_SIZES), (), {"input_ids": _batch(0, "cpu")}


def run(validate: bool) -> int:
    """Print losses, the plan, and times where there is a GPU; 1 where a recipe's loss is off."""
    device = "cuda" if is_available() else "cpu"
    start = _model(_SIZES, device).train()
    rows = [("recipe", "sites", "loss, first step", f"loss, step {STEPS}", "off, of what was learned")]
    want = _losses(copied := copy.deepcopy(start), copied, device)
    rows.append(("bfloat16", "-", f"{want[0]:.4f}", f"{want[-1]:.4f}", "-"))
    wrong = []
    for recipe in RECIPES if validate else QUICK:
        sites, got = _trained(copy.deepcopy(start), recipe, device)
        off = abs(got[-1] - want[-1]) / (want[0] - want[-1])
        rows.append((recipe, sites, f"{got[0]:.4f}", f"{got[-1]:.4f}", f"{off:.2%}"))
        if not off <= TOLERANCE:
            wrong.append(f"{recipe}: the last loss is {off:.2%} off, {TOLERANCE:.0%} allowed")
    print(common.table(rows))
    print("\nplanned for two layers of Llama-8B's shape on an H100, 8192 tokens, training:")
    print(_plan())
    if device == "cuda":
        print(_timed())
    print(
        "\n" + ("\n".join(f"NOT AS EXPECTED  {line}" for line in wrong) or "every loss came out as expected")
    )
    return 1 if wrong else 0


def _options(recipe: str, device: str) -> dict[str, Any]:
    reference = {"cpu_rewrites": True, "lowering": "aot_eager"} if device == "cpu" else {}
    return {**reference, "strict": True, "fp8_linear": {"mode": "on", "recipe": recipe}}


def _trained(model: Any, recipe: str, device: str) -> tuple[str, list[float]]:
    torch._dynamo.reset()
    with capture_reports() as reports, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = _losses(torch.compile(model, backend="kp", options=_options(recipe, device)), model, device)
    report = merged(reports)
    linear = [site for site in report.sites if site.kind == "linear"]
    return f"{len(report.rewritten('linear'))} of {len(linear)}", losses


def _plan() -> str:
    model = _model(_LARGE, "meta").train()
    ids = torch.zeros(1, _LARGE_TOKENS, dtype=torch.long, device="meta")
    options = {"fp8_linear": {"mode": "auto", "recipe": "delayed"}}
    report = plan(model, input_ids=ids, labels=ids, target="cuda:sm90", dtype=torch.bfloat16, options=options)
    rows = [("where", "shape", "result", "predicted gain")]
    for site in report.sites[: 1 + len(report.sites) // 2]:
        if site.kind == "linear":
            gain = f"{site.predicted['gain']}x" if site.predicted else str(site.reason)
            rows.append((site.module, site.shape, site.spec or "refused", gain))
    return common.table(rows)


def _timed() -> str:
    """Milliseconds of a training step of the large layers under Inductor and in FP8."""
    model = _model(_LARGE, "cuda").train()
    ids = torch.randint(0, 512, (1, _LARGE_TOKENS), device="cuda")
    rows = [("arm", "ms a step")]
    for name, settings in (
        ("Inductor", {"backend": "inductor"}),
        ("kp", {"backend": "kp"}),
        ("kp, delayed", {"backend": "kp", "options": _options("delayed", "cuda")}),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, **settings)  # type: ignore[call-overload]

        def step(compiled: Any = compiled) -> None:
            compiled(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            step()
        torch.accelerator.synchronize()
        rows.append((name, f"{(time.perf_counter() - begin) * 100:.1f}"))
    return "\n" + common.table(rows)
