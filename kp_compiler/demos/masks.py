"""What kp proves each mask to be, and what it says where it can't.

Tiny transformers models are planned for an H100 (no GPU is needed: nothing is computed). With `--validate`
each is also rewritten onto the reference kernels on the CPU and compared with the uncompiled model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kp_compiler.capture import plan
from kp_compiler.demos import common
from kp_compiler.report import Report, SiteRecord

SUMMARY = "what each mask is proved to be, the kernel planned for it on an H100, and one that can't be proved"
TARGET = "cuda:sm90"
TOKENS = 128
BOUND = 1e-5  # relative RMS error allowed in float32
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_BATCH = 2

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what its mask should be proved to be ("" where it can't be)."""

    model: str
    built_as: str
    proved: str
    make: Callable[[], tuple[Any, Inputs]]


def _llama(implementation: str = "sdpa") -> Any:
    transformers = common.transformers()
    config = transformers.LlamaConfig(
        **_SIZES,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
        attn_implementation=implementation,
    )
    return common.build(transformers.LlamaForCausalLM, config)


def _mistral() -> Any:
    transformers = common.transformers()
    config = transformers.MistralConfig(
        **_SIZES,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
        sliding_window=32,
        attn_implementation="sdpa",
    )
    return common.build(transformers.MistralForCausalLM, config)


def _bert() -> Any:
    transformers = common.transformers()
    config = transformers.BertConfig(**_SIZES, initializer_range=0.2, attn_implementation="eager")
    return common.build(transformers.BertModel, config)


def _tokens(**more: torch.Tensor) -> Inputs:
    return {
        "input_ids": torch.randint(0, 256, (_BATCH, TOKENS), generator=torch.Generator().manual_seed(0)),
        **more,
    }


def _padding(*, left: bool) -> torch.Tensor:
    keep = torch.ones(_BATCH, TOKENS, dtype=torch.long)
    keep[0, slice(0, 40) if left else slice(88, None)] = 0
    return keep


def _packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(50), torch.arange(78)]).expand(_BATCH, -1)


def _handed_in() -> torch.Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(_BATCH, 1, TOKENS, TOKENS)


CASES = (
    Case("Llama, sdpa", "causal, over positions", "causal", lambda: (_llama(), _tokens())),
    Case("Llama, eager", "causal, added as finfo.min", "causal", lambda: (_llama("eager"), _tokens())),
    Case("Mistral", "causal, last 32 keys", "causal+window(32)", lambda: (_mistral(), _tokens())),
    Case(
        "Llama, two packed documents", "position_ids that restart", "causal+document",
        lambda: (_llama(), _tokens(position_ids=_packed_positions())),
    ),
    Case(
        "Llama, left padding", "causal and attention_mask", "causal+padding",
        lambda: (_llama(), _tokens(attention_mask=_padding(left=True))),
    ),
    Case(
        "BERT, right padding", "attention_mask, added", "padding",
        lambda: (_bert(), _tokens(attention_mask=_padding(left=False))),
    ),
    Case(
        "Llama, 4-D mask argument", "handed in by the caller", "",
        lambda: (_llama(), _tokens(attention_mask=_handed_in())),
    ),
)  # fmt: skip


def example() -> tuple[Any, tuple[Any, ...], Inputs]:
    """The windowed model, for `kp plan masks`."""
    return _mistral(), (), _tokens()


def run(validate: bool) -> int:
    """Print the table; 1 where a mask is not proved to be what it is."""
    rows = [
        ("model", "mask built as", "proved", "kernel planned for an H100", *(("error",) if validate else ()))
    ]
    unproved: list[SiteRecord] = []
    wrong: list[str] = []
    for case in CASES:
        model, inputs = case.make()
        with torch.no_grad():
            report = plan(model, target=TARGET, dtype=torch.bfloat16, **inputs)
        site = _only_site(report)
        proved = site.spec if site is not None and site.status == "rewritten" and site.spec else ""
        if proved != case.proved or site is None:
            wrong.append(
                f"{case.model}: proved {proved or 'nothing'!r}, expected {case.proved or 'nothing'!r}"
            )
        if site is not None and not proved:
            unproved.append(site)
        kernel = (site.impl or "left as it is") if site is not None else "no site found"
        row = [case.model, case.built_as, proved or "not proved", kernel]
        if validate:
            error = _error(model, inputs)
            row.append(f"{error:.1e}")
            if error > BOUND:
                wrong.append(f"{case.model}: relative RMS error {error:.1e} is above {BOUND:.0e}")
        rows.append(tuple(row))  # type: ignore[arg-type]
    print(common.table(rows))
    for site in unproved:
        print(f"\nWhy not ({site.module}):\n  {site.reason.text if site.reason else '?'}")
        if site.reason is not None and site.reason.hint:
            print(f"  {site.reason.hint}")
    if validate:
        print(
            "\nerror: relative RMS of the rewritten float32 model (CPU, reference kernels) against the "
            f"uncompiled float64 model; at most {BOUND:.0e}"
        )
    print(
        "\n"
        + (
            "\n".join(f"NOT AS EXPECTED  {line}" for line in wrong)
            if wrong
            else "every mask came out as expected"
        )
    )
    return 1 if wrong else 0


def _only_site(report: Report) -> SiteRecord | None:
    """All layers of these models have the same mask: the first record stands for all, if all agree."""
    kinds = {(s.status, s.impl, s.spec) for s in report.sites}
    return report.sites[0] if len(kinds) == 1 else None


def _error(model: Any, inputs: Inputs) -> float:
    """Relative error of the rewritten model against the uncompiled one in float64, on the CPU."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = common.reference_of(model, torch.float64)(**inputs)[0]
        torch._dynamo.reset()
        options = {"cpu_rewrites": True, "lowering": "aot_eager"}
        got = torch.compile(model, backend="kp", options=options)(**inputs)[0]
        torch._dynamo.reset()
    keep = inputs.get("attention_mask")
    if keep is not None and keep.dim() == 2:  # what stands at padded positions has no meaning
        got, want = got[keep.bool()], want[keep.bool()]
    return common.relative_error([got], [want])
