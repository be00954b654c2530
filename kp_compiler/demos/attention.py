"""The main job: in an unmodified transformers Llama find attention, prove its mask, write a kernel in.

On a CPU: a small model, rewritten onto the reference kernels (`cpu_rewrites`), checked against the uncompiled
model, and the plan for an H100. On a GPU: a larger model in bfloat16, checked, and timed against Inductor.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kp_compiler import target as targets
from kp_compiler.capture import capture_reports, merged, plan
from kp_compiler.demos import common
from kp_compiler.report import Report

SUMMARY = (
    "the main job: a transformers Llama compiled with kp, reported, checked, and planned or timed on a GPU"
)
IMPLEMENTATIONS = {
    "eager": "attention written out as matmul, mask, softmax, matmul",
    "sdpa": "F.scaled_dot_product_attention with a mask built in the graph",
}
# How far kp's error may exceed the uncompiled model's, both against a wider reference. Measured on the CPU in
# float32: 0.9 to 1.1 (reductions in another order); the rest is room for other machines.
BOUND = 1.5


@dataclass(frozen=True)
class Setting:
    """A model size and how it is run."""

    device: str
    dtype: torch.dtype
    reference: torch.dtype  # the dtype of the model that errors are measured against
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tokens: int
    train_tokens: int
    options: dict[str, Any] | None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"Llama, 4 layers, d {self.hidden}, {self.heads}:{self.kv_heads} heads, ffn {self.ffn}, "
            f"{self.tokens} tokens, {name}, random weights, on {self.device}"
        )


SMALL = Setting(
    "cpu", torch.float32, torch.float64, 256, 8, 2, 512, 1024, 256, 256, {"cpu_rewrites": True}
)  # fmt: skip
LARGE = Setting("cuda", torch.bfloat16, torch.float32, 2048, 32, 8, 8192, 32000, 8192, 2048, None)


def setting() -> Setting:
    """The large one where there is a GPU."""
    if targets.is_available():
        return LARGE
    if targets.cpp_compiler() is None:
        print("no C++ compiler was found: graphs are lowered to AOTAutograd's eager mode instead of Inductor")
        return dataclasses.replace(SMALL, options={"cpu_rewrites": True, "lowering": "aot_eager"})
    return SMALL


def build(size: Setting, implementation: str) -> Any:
    transformers = common.transformers()
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=4,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=max(size.tokens, 512),
        initializer_range=1.5 / size.hidden**0.5,  # scores of order one, so that a wrong mask would show
        use_cache=False,
        attn_implementation=implementation,
    )
    return common.build(transformers.LlamaForCausalLM, config, device=size.device, dtype=size.dtype)


def tokens(size: Setting, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size.vocab, (1, count), generator=generator).to(size.device)


def example() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The small model, for `kp plan attention`."""
    return build(SMALL, "sdpa"), (), {"input_ids": tokens(SMALL, SMALL.tokens)}


def run(validate: bool) -> int:
    """Run both implementations; 1 where a check fails."""
    start = time.perf_counter()
    size = setting()
    common.transformers()
    while True:
        print(size)
        try:
            failed = _all_implementations(size, validate)
            break
        except torch.OutOfMemoryError:
            if size.tokens <= 1024:
                raise
            size = dataclasses.replace(size, tokens=size.tokens // 2, train_tokens=size.train_tokens // 2)
            print("this does not fit into the GPU's memory; once more with half the tokens")
        _release()
    verdict = f"FAILED: {'; '.join(failed)}" if failed else "every check passed"
    print(f"\n{verdict}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _all_implementations(size: Setting, validate: bool) -> list[str]:
    """What failed."""
    failed: list[str] = []
    for implementation, meaning in IMPLEMENTATIONS.items():
        print(f"\n=== {implementation}: {meaning}")
        model = build(size, implementation)
        failed += _forward(model, size, implementation)
        if validate:
            failed += _gradients(model, size, implementation)
        if size.device == "cpu":
            ids = tokens(size, size.tokens)
            with torch.no_grad():
                planned = plan(model, input_ids=ids, target="cuda:sm90", dtype=torch.bfloat16)
            print("\nplanned for an H100 (nothing computed):\n" + _indent(planned.table()))
        del model
        _release()
    return failed


def _forward(model: Any, size: Setting, implementation: str) -> list[str]:
    """Compile, report, compare outputs and, on a GPU, time."""
    inputs = {"input_ids": tokens(size, size.tokens), "logits_to_keep": 256}
    with torch.no_grad(), capture_reports() as reports:
        compiled = torch.compile(model, backend="kp", options=size.options, dynamic=False)
        got = compiled(**inputs).logits
        found = merged(reports)
        print(_indent(found.table()))
        print(_counts(found))
        own = model(**inputs).logits
        want = common.reference_of(model, size.reference)(**inputs).logits
        failed = _compare("outputs", [got], [own], [want], size)
        del got, own, want
        if size.device != "cpu":
            inductor = torch.compile(model, backend="inductor", dynamic=False)
            _time({"kp": lambda: compiled(**inputs), "Inductor": lambda: inductor(**inputs)})
    if not found.sites or found.refused():
        failed.append("not every attention site was rewritten")
    return [f"{implementation}: {text}" for text in failed]


def _gradients(model: Any, size: Setting, implementation: str) -> list[str]:
    """One backward of the loss, compiled and not, against the reference."""
    ids = tokens(size, size.train_tokens)
    twin = common.reference_of(model, size.reference)
    with capture_reports() as reports:
        got = _backward(torch.compile(model, backend="kp", options=size.options, dynamic=False), model, ids)
        found = merged(reports)
    print(f"\ntraining step, {size.train_tokens} tokens: {_counts(found)}")
    own = _backward(model, model, ids)
    want = _backward(twin, twin, ids)
    return [f"{implementation}: {text}" for text in _compare("gradients", got, own, want, size)]


def _backward(step: Callable[..., Any], model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    step(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def _compare(what: str, got: list[Any], own: list[Any], want: list[Any], size: Setting) -> list[str]:
    """kp's error against the reference may be at most BOUND times the uncompiled model's."""
    ours, theirs = common.relative_error(got, want), common.relative_error(own, want)
    ok = ours <= BOUND * theirs
    name = str(size.reference).removeprefix("torch.")
    print(
        f"{what}: relative RMS error against the uncompiled {name} model {ours:.2e}, "
        f"of the uncompiled model itself {theirs:.2e}; "
        f"at most {BOUND:g} times that: {'ok' if ok else 'NOT MET'}"
    )
    return [] if ok else [f"error of {what} {ours:.2e}"]


def _counts(report: Report) -> str:
    """Found, proved, rewritten, refused in one line."""
    sites = [s for s in report.sites if s.kind == "attention"]
    done = report.rewritten("attention")
    proved = [s for s in done if s.spec is not None and not s.spec.startswith("tensor")]
    return (
        f"attention sites: {len(sites)} found, {len(proved)} masks proved, {len(done)} rewritten, "
        f"{len(report.refused('attention'))} refused"
    )


def _time(steps: dict[str, Callable[[], Any]], repeats: int = 15) -> None:
    median = common.medians(steps, repeats)
    listed = ", ".join(f"{name} {value:.2f} ms" for name, value in median.items())
    print(f"forward, median of {repeats}: {listed}; speed-up {median['Inductor'] / median['kp']:.2f}x")


def _release() -> None:
    torch._dynamo.reset()
    gc.collect()
    if targets.is_available():
        torch.accelerator.empty_cache()


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
