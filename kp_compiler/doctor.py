"""What this machine or a named target can do: libraries, passes, attention kernels, each with its reason.

Everything is asked of the code that decides: passes through `applies`, kernels through `check`. Nothing here
can go stale, and the tables of the README are made by the same functions (`make readme`).
"""

from __future__ import annotations

import dataclasses
import inspect
import platform
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule

from kp_compiler import config as configs
from kp_compiler import target as targets
from kp_compiler.capture import versions
from kp_compiler.config import Config, PassConfig
from kp_compiler.errors import KPConfigError
from kp_compiler.lowering import table
from kp_compiler.passes import ALL_PASSES
from kp_compiler.passes.base import Context, Pass
from kp_compiler.report import Rejection
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec, BiasSpec, MaskSpec
from kp_compiler.target import Target

Rows = list[tuple[str, ...]]

_WINDOW = MaskSpec("window", "(k - q <= 0) & (q - k - 1023 <= 0)", window=1024, parts=("causal", "window"))
_DOCUMENT = MaskSpec(
    "document", "Eq(t0(b, q), t0(b, k)) & (k <= q)", (0,), 0, (0,), None, ("causal", "document")
)
_PADDING = MaskSpec("padding", "Ne(t0(b, k), 0)", (0,), parts=("padding",))

# What the kernel table is asked about: a heading, a spec, and changes to the usual shape.
PROBES: tuple[tuple[str, AttentionSpec, dict[str, object]], ...] = (
    ("full", AttentionSpec(0.125), {}),
    ("causal", AttentionSpec(0.125, CAUSAL), {}),
    ("causal, dropout", AttentionSpec(0.125, CAUSAL, dropout_p=0.1), {"training": True}),
    ("window", AttentionSpec(0.125, _WINDOW), {}),
    ("documents", AttentionSpec(0.125, _DOCUMENT), {}),
    ("padding", AttentionSpec(0.125, _PADDING, dead_rows="mean"), {}),
    ("bias", AttentionSpec(0.125, CAUSAL, (BiasSpec(0),), form="softmax"), {}),
    ("soft-cap", AttentionSpec(0.125, CAUSAL, softcap=50.0, form="softmax"), {}),
    ("sinks", AttentionSpec(0.125, CAUSAL, sink=0, form="softmax"), {}),
    ("unproved mask", AttentionSpec(0.125, MaskSpec("tensor", "", (0,))), {}),
    ("head size 256", AttentionSpec(0.125, CAUSAL), {"head_dim": 256, "value_dim": 256}),
    ("float32", AttentionSpec(0.125, CAUSAL), {"dtype": torch.float32}),
)


def shape(target: Target, **changes: object) -> AttentionShape:
    """A usual site: 8192 tokens, 32 query and 8 key heads of size 128, bfloat16, no gradients."""
    usual = AttentionShape(1, 32, 8, 8192, 8192, 128, 128, torch.bfloat16, target.device, False)
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def report(target: Target | None = None) -> str:
    """The whole page. Without a target: this machine."""
    here = target or targets.parse("auto")
    sections = [] if target is not None else [("this machine", align(machine()))]
    sections += [
        (f"passes on {here}", align(passes(here))),
        (f"attention kernels on {here}, for a causal bfloat16 site with head size 128", align(kernels(here))),
    ]
    text = "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections)
    if here.device == "cpu":
        text += (
            "\n\nThe kernels above are for GPUs; under cpu_rewrites a CPU graph gets the reference kernel. "
            "`kp doctor --target cuda:sm90` shows this page for an H100."
        )
    return text


def distributed() -> tuple[str, bool]:
    """Try what `context_parallel` does on the processes that torchrun started: what there is to say, on the
    first of them, and whether all is well."""
    import torch.distributed as dist

    from kp_compiler.validate_context import validate_context_parallel

    if not dist.is_torchelastic_launched():
        raise KPConfigError("doctor --distributed: start it with torchrun, -m kp_compiler.cli doctor …")
    on_gpu = targets.is_available()
    if on_gpu:
        torch.accelerator.set_device_index(dist.get_node_local_rank() % torch.accelerator.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        size = dist.get_world_size()
        heads = 32 if 32 % size == 0 else 4 * size
        tokens = -(-131072 // (2 * size)) * 2 * size
        found = validate_context_parallel(
            dist.group.WORLD, tokens=tokens, heads=heads, kv_heads=heads // 4,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        )  # fmt: skip
        lines = [
            f"{found.ranks} ranks, {found.backend}, {found.link / 1e9:.3g} GB/s from each to the next",
            f"one causal site of {tokens} tokens, {heads} heads for {heads // 4} of keys, head size 128:",
            *(f"  {line}" for line in align(found.rows())),
            *([f"WRONG  {problem}" for problem in found.problems] or ["everything works"]),
        ]
        text = "".join(f"{line}\n" for line in lines) if dist.get_rank() == 0 else ""
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return text, found.ok


def machine() -> Rows:
    """Python, libraries, device, compilers."""
    here, found = targets.parse("auto"), versions()
    on_gpu = here.device == "cuda"
    gpu = f"{here.name}, compute capability {here.sm / 10}" if on_gpu else "none usable"
    compiler = targets.cpp_compiler()
    return [
        ("python", platform.python_version()),
        (
            "kp",
            found.get(
                "kp-compiler", 'not installed as a package: backend="kp" is known only after an import'
            ),
        ),
        ("torch", torch.__version__),
        ("triton", found.get("triton", "not installed")),
        (
            "transformers",
            found.get("transformers", "not installed (the demos need it: pip install 'kp-compiler[demo]')"),
        ),
        ("CUDA device", gpu),
        ("cuDNN", str(here.cudnn) if here.cudnn else "none" if on_gpu else "no CUDA device"),
        ("FlashAttention-2 in ATen", ("yes" if here.has_flash else "no") if on_gpu else "no CUDA device"),
        (
            "FlashAttention-4",
            "installed" if targets.has_fa4() else "not installed (pip install 'kp-compiler[fa4]')",
        ),
        (
            "Transformer Engine",
            found.get("transformer-engine", "installed")
            if targets.has_te()
            else "not installed (pip install --no-build-isolation 'kp-compiler[te]')",
        ),
        ("C++ compiler", compiler or "none found: Inductor can't compile CPU graphs, they run eagerly"),
    ]


def passes(target: Target, config: Config | None = None) -> Rows:
    """Each flag, its default, its mode now and where that came from, and why it is off on this target."""
    config = config or configs.resolve()
    rows: Rows = [("flag", "default", "now", "on this target")]
    for each in ALL_PASSES:
        now = getattr(config, each.name).mode
        source = config.sources.get(f"{each.name}.mode")
        rows.append(
            (
                each.name,
                _default(each).mode,
                now + (f" ({source})" if source else ""),
                _state(each, target, config),
            )
        )
    return rows


def kernels(target: Target) -> Rows:
    """Each attention kernel, those in the table's order for the target first: yes, or the reason why not."""
    first = table.order(target, AttentionSpec(0.125, CAUSAL))
    spec = AttentionSpec(0.125, CAUSAL)
    rows: Rows = [("kernel", "available")]
    for entry in (*first, *(e for e in table.ATTENTION if e not in first)):
        refused = entry.check(spec, shape(target), target)
        rows.append((entry.name, "yes" if refused is None else str(refused)))
    return rows


def passes_markdown() -> str:
    """The README's table of passes: what each does, flag, default, own settings, where it is not applied."""
    rows: Rows = [("pass", "flag", "tier", "default", "own settings", "not applied")]
    common = {field.name for field in dataclasses.fields(PassConfig)}
    for each in ALL_PASSES:
        default = _default(each)
        own = [f for f in dataclasses.fields(default) if f.name not in common]
        settings = ", ".join(f"`{f.name}={_literal(getattr(default, f.name))}`" for f in own) or "-"
        rows.append(
            (_summary(each), f"`{each.name}`", each.tier, f"`{default.mode}`", settings, _nowhere(each))
        )
    return _markdown(rows)


def kernels_markdown(name: str = "cuda:sm90") -> str:
    """The README's table of kernels: which takes what on a target, yes or the code of the reason why not."""
    target = dataclasses.replace(targets.parse(name), has_fa4=True)
    order = table.order(target, AttentionSpec(0.125, CAUSAL))
    rows: Rows = [("site", *(entry.name for entry in order))]
    for heading, spec, changes in PROBES:
        outcomes = [entry.check(spec, shape(target, **changes), target) for entry in order]
        rows.append((heading, *("yes" if refused is None else refused.code for refused in outcomes)))
    return _markdown(rows)


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of equal columns."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _default(each: Pass) -> PassConfig:
    return configs.PASS_CONFIGS[each.name]()


def _state(each: Pass, target: Target, config: Config) -> str:
    if config.disabled:
        return "off: KP_DISABLE is set"
    if getattr(config, each.name).mode == "off":
        return "off: its flag is off"
    left = target.device == "cpu" and not (target.reference or config.cpu_rewrites)
    if left and each.tier != "distributed":
        return "off: CPU graphs are not rewritten (options={'cpu_rewrites': True} does it)"
    refused = _applies(each, target, config)
    return f"off: {refused}" if refused is not None else "on"


def _applies(each: Pass, target: Target, config: Config) -> Rejection | None:
    """What the pass says of the target, asked with an empty graph; those that share sequences take any."""
    if each.tier == "distributed":
        return None
    return each.applies(Context(GraphModule(torch.nn.Module(), Graph()), config, target))


def _nowhere(each: Pass) -> str:
    """The reasons a pass gives on the usual targets, grouped."""
    config = Config()
    reasons: dict[str, list[str]] = {}
    here_cpu = Target(device="cpu", name="cpu")
    for name, target in (
        ("CPU", here_cpu),
        *((f"sm{sm}", targets.parse(f"cuda:sm{sm}")) for sm in (75, 80, 90, 100)),
    ):
        refused = _applies(each, target, config)
        if refused is not None:
            reasons.setdefault(refused.text, []).append(name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in reasons.items()) or "-"


def _literal(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _summary(each: Pass) -> str:
    """The first line of the module docstring of a pass."""
    module = inspect.getmodule(type(each))
    doc = inspect.getdoc(module) if module is not None else None
    return (doc or each.name).split("\n\n")[0].replace("\n", " ").rstrip(".")


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
