"""Options: what exists, where a value came from, and one clear error for everything else.

Precedence, strongest first: `torch.compile(options=...)`, `with kp.options(...)`, the environment variable
`KP_PASSES="+name,-name"`, defaults. `KP_DISABLE=1` bypasses kp. This is the only module that reads the
environment for options.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import hashlib
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from kp_compiler.errors import KPConfigError

Mode = Literal["off", "auto", "on", "require"]
Lowering = Literal["inductor", "aot_eager", "eager"]
Impl = Literal["auto", "cudnn", "flash", "efficient", "flex", "fa4", "triton", "reference"]
Selector = Literal["content", "vertical_slash", "structured", "random", "learned", "auto"]
Estimate = Literal["sampled", "pooled", "antidiagonal"]
PRODUCTS = ("fprop", "dgrad", "wgrad")
Fp8Impl = Literal["auto", "scaled_mm", "te"]
Schedule = Literal["auto", "ring", "allgather", "ulysses", "hybrid"]
Recipe = Literal["tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise"]


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """Settings every pass has."""

    mode: Mode = (
        "auto"  # auto: where proved and predicted to gain; on: where proved; require: on, or an error
    )
    expect: int | None = None  # raise unless the pass fires at this many sites or more
    skip: tuple[str, ...] = ()  # module paths (substrings) to leave alone
    only: tuple[str, ...] = ()  # if given, module paths (substrings) to work on


@dataclass(frozen=True, kw_only=True)
class RaiseAttentionConfig(PassConfig):
    """Recognising attention."""


@dataclass(frozen=True, kw_only=True)
class ProveMasksConfig(PassConfig):
    """Proving masks."""

    fill_threshold: float = -1e8  # a finite fill at or below this counts as "left out" where no row is dead


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(PassConfig):
    """Computing the blocks of attention that hold most of it."""

    mode: Mode = "off"
    selector: Selector = "content"  # what blocks are chosen by; auto: the best one of the calibration
    # share of the blocks under the mask that is left out; 0.9 where `mass` is not given
    sparsity: float | None = None
    mass: float | None = None  # the fewest blocks that hold this share of the estimated probabilities
    error: float | None = None  # relative error of a head's output above which it computes everything
    estimate: Estimate = "sampled"  # what `content` takes for the shares of blocks
    sink_blocks: int = 1  # first blocks of each row, always computed
    local_blocks: int = 2  # blocks of a query's own key and before it, always computed
    min_tokens: int = 8192  # keys from which on blocks are chosen, as a graph's first call has them
    dense_heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by module path (substrings)
    shared: bool = False  # one choice for all query heads of a key head
    seed: int = 0  # of `random`
    calibration: str | None = None  # a file of kp.calibrate: what blocks cost, for the report and `auto`
    gates: str | None = None  # a file of kp.train_selectors, for `learned`


@dataclass(frozen=True)
class Ranks:
    """A mesh as plain data: the name of the process group of all of it, this rank, how many there are."""

    group: str
    rank: int
    size: int
    device: str  # "cuda" or "cpu", which the group's backend is for
    grid: tuple[str, str] | None = None  # of two dimensions: the groups of this rank's column and of its row
    row: int = 1  # ranks of a row

    def sharing(self, schedule: str, layout: str = "zigzag") -> int:
        """How many ranks share heads; zero where the mesh and the layout have no such schedule."""
        return sharing(schedule, self.size, self.row, layout)


def sharing(schedule: str, size: int, row: int, layout: str = "zigzag") -> int:
    """How many of `size` ranks, of which a grid has `row` in a row, share heads by a schedule; zero where one
    row is no grid, and where rows have no layout of their own."""
    return {"ulysses": size, "hybrid": row if row > 1 and layout != "documents" else 0}.get(schedule, 1)


@dataclass(frozen=True, kw_only=True)
class RingAttentionConfig(PassConfig):
    """Sequences that ranks share, keys and values going round."""

    mode: Mode = "off"
    mesh: Ranks | None = None  # a DeviceMesh of one dimension, or two for "hybrid"; a process group
    layout: Literal["zigzag", "contiguous", "documents"] = "zigzag"  # as shard_sequence divided the batch


@dataclass(frozen=True, kw_only=True)
class ContextParallelConfig(RingAttentionConfig):
    """Sequences that ranks share, by the best schedule."""

    schedule: Schedule = "auto"  # auto: the one that is predicted to be fastest
    memory: float | None = None  # auto: GiB that keys and values of a site may take while they are exchanged


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(PassConfig):
    """Choosing kernels for attention."""

    impl: Impl = "auto"  # a kernel by name never falls back: where it can't serve a site, the site is refused


@dataclass(frozen=True, kw_only=True)
class RaiseLinearConfig(PassConfig):
    """Recognising products with a weight. Runs where a pass that works on them is on."""


@dataclass(frozen=True, kw_only=True)
class Fp8LinearConfig(PassConfig):
    """Products with a weight in FP8."""

    mode: Mode = "off"
    # auto, scaled_mm: kp's casts and cuBLASLt; te, by name only: Transformer Engine's, for every site or none
    impl: Fp8Impl = "auto"
    recipe: Recipe = "tensorwise"  # which elements share a scale, and in which products
    recipes: Mapping[str, Recipe] = field(default_factory=dict)  # module paths (substrings) with another one
    grad_dtype: Literal["auto", "e4m3", "e5m2"] = "auto"  # auto: e5m2 with one scale a tensor, else e4m3
    power_of_two_scales: bool = False  # scales that change no mantissa
    fast_accum: tuple[str, ...] = (
        "fprop",
    )  # products whose partial sums are not promoted: fprop, dgrad, wgrad
    amax_history: int = 1024  # delayed: steps that a largest magnitude is remembered for
    margin: int = 1  # delayed: powers of two of headroom above the largest magnitude
    reduce_amax: bool = False  # delayed: the largest magnitude over all processes of the default group
    merge: bool = True  # one product for all weights that read the same activation
    # what is kept for the backward pass. input: inputs of layers as they are; auto: of inputs of the graph,
    # which are read from memory anyway, the transposed FP8 copy instead; fp8: products that pointwise
    # operations of the backward pass read (gate and up projections) in FP8 too
    save: Literal["auto", "input", "fp8"] = "auto"
    cache_weights: bool = True  # inference: keep weights in FP8 until a parameter's version counter moves


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every option, resolved."""

    raise_attention: RaiseAttentionConfig = field(default_factory=RaiseAttentionConfig)
    prove_masks: ProveMasksConfig = field(default_factory=ProveMasksConfig)
    ring_attention: RingAttentionConfig = field(default_factory=RingAttentionConfig)
    context_parallel: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    sparse_attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    raise_linear: RaiseLinearConfig = field(default_factory=RaiseLinearConfig)
    fp8_linear: Fp8LinearConfig = field(default_factory=Fp8LinearConfig)
    strict: bool = False  # a pass that fails raises instead of being undone
    verify: bool = False  # run every rewritten site beside the original before using it
    cpu_rewrites: bool = False  # rewrite CPU graphs too, onto the reference kernels
    lowering: Lowering = "inductor"  # who compiles the rewritten graph
    report_dir: str | None = None  # write one JSON report per graph here
    mode: str | None = None  # torch.compile's mode, passed on to Inductor
    inductor: Mapping[str, Any] = field(default_factory=dict)  # Inductor options, passed on
    disabled: bool = False  # KP_DISABLE=1
    sources: Mapping[str, str] = field(default_factory=dict)  # option -> where its value came from

    def passes(self) -> dict[str, PassConfig]:
        return {name: getattr(self, name) for name in PASS_CONFIGS}

    def shares_sequences(self) -> bool:
        """Whether a graph computes something else without kp's passes."""
        return "off" != self.ring_attention.mode or "off" != self.context_parallel.mode

    @property
    def ranks(self) -> int:
        """How many share a graph's sequence."""
        meshes = [each.mesh for each in (self.ring_attention, self.context_parallel) if each.mode != "off"]
        return next((mesh.size for mesh in meshes if mesh is not None), 1)

    def fingerprint(self) -> str:
        """Digest of every setting that can change a compiled graph."""
        data = dataclasses.asdict(self)
        for volatile in ("sources", "report_dir"):
            del data[volatile]
        return hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest()[:16]


PASS_CONFIGS: dict[str, type[PassConfig]] = {
    "raise_attention": RaiseAttentionConfig,
    "prove_masks": ProveMasksConfig,
    "ring_attention": RingAttentionConfig,
    "context_parallel": ContextParallelConfig,
    "sparse_attention": SparseAttentionConfig,
    "attention": AttentionConfig,
    "raise_linear": RaiseLinearConfig,
    "fp8_linear": Fp8LinearConfig,
}
SHARING = ("ring_attention", "context_parallel")
GLOBAL_KEYS = ("strict", "verify", "cpu_rewrites", "lowering", "report_dir", "mode", "inductor")

_scoped: contextvars.ContextVar[tuple[Mapping[str, Any], ...]] = contextvars.ContextVar(
    "kp_options", default=()
)


@contextlib.contextmanager
def options(**settings: Any) -> Iterator[None]:
    """Options for every compilation that happens inside the block, on this thread.

    They are read when the backend runs, that is at a model's first call and at recompiles. Compiled code is
    not guarded on them: leaving the block recompiles nothing.
    """
    resolve(settings, env={})  # errors belong here, not at the first call of a model
    token = _scoped.set((*_scoped.get(), settings))
    try:
        yield
    finally:
        _scoped.reset(token)


def resolve(
    settings: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Config:
    """Merge defaults, environment, `kp.options` scopes and `settings` into a Config, or raise
    KPConfigError."""
    env = os.environ if env is None else env
    if env.get("KP_DISABLE", "") not in ("", "0"):
        for name in SHARING:
            asked = [layer[name] for layer in (*_scoped.get(), settings or {}) if name in layer]
            if asked and _asked(asked[-1]):
                raise KPConfigError(f"KP_DISABLE: {name} is on, and the model would be wrong without it")
        return Config(disabled=True)
    layers: list[tuple[str, Mapping[str, Any]]] = [("KP_PASSES", _from_env(env.get("KP_PASSES", "")))]
    layers += [("kp.options", scope) for scope in _scoped.get()]
    if settings is not None and not isinstance(settings, Mapping):
        raise KPConfigError(f"options: got {type(settings).__name__}, expected a dict")
    layers.append(("options", settings or {}))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for key, value in layer.items():
            _merge(values, sources, key, value, source)
    if mode is not None:  # as strong as `settings`: torch.compile takes only one of the two
        if settings and settings.get("mode", mode) != mode:
            raise KPConfigError(
                f"mode: got {mode!r} from torch.compile and {settings['mode']!r} from options"
            )
        values["mode"] = mode
    if "inductor" in values or "mode" in values:
        _check_inductor(values.get("mode"), values.get("inductor", {}))
    _check_consistent(values, sources)
    return Config(**values, sources=sources)


def _asked(value: Any) -> bool:
    """Whether an option switches a pass on that is off by default."""
    mode = value.get("mode", "auto") if isinstance(value, Mapping) else value
    return mode not in ("off", False)


def _check_consistent(values: dict[str, Any], sources: dict[str, str]) -> None:
    """A pass that must fire needs the ones it builds on, a selector the file that it reads."""
    _check_shared(values)
    sparse = values.get("sparse_attention", SparseAttentionConfig())
    for selector, file, maker in (
        ("auto", "calibration", "calibrate"),
        ("learned", "gates", "train_selectors"),
    ):
        if sparse.mode != "off" and sparse.selector == selector and getattr(sparse, file) is None:
            raise KPConfigError(
                f"sparse_attention.selector: {selector!r} needs {file}=, a file that kp.{maker} wrote"
            )
    if sparse.mass is not None and sparse.selector in ("structured", "random", "auto"):
        raise KPConfigError(
            f"sparse_attention.mass: {sparse.selector!r} estimates no probabilities, expected one of "
            "'content', 'vertical_slash', 'learned'"
        )
    for finder, users in (
        ("raise_attention", ("prove_masks", *SHARING, "sparse_attention", "attention")),
        ("prove_masks", SHARING),
        ("attention", ("sparse_attention",)),
        ("raise_linear", ("fp8_linear",)),
    ):
        if getattr(values.get(finder), "mode", "auto") != "off":
            continue
        for name in users:
            settings = values.get(name)
            if settings is None or settings.mode == "off":
                continue
            if name in SHARING or settings.mode == "require" or settings.expect:
                where = sources.get(f"{finder}.mode", "options")
                raise KPConfigError(f"{name}: required, but {finder}, which it needs, is off ({where})")


def _check_shared(values: dict[str, Any]) -> None:
    """Sequences are shared by whole models, in one way, and with passes that keep to it."""
    for name in SHARING:
        settings = values.get(name)
        if settings is None or settings.mode == "off":
            continue
        if settings.mesh is None:
            raise KPConfigError(f"{name}: needs mesh=, a DeviceMesh: mesh['cp'], say")
        if settings.skip or settings.only:
            raise KPConfigError(f"{name}: skip and only would leave attention within parts of sequences")
        for other in SHARING:
            if other != name and other in values and values[other].mode != "off":
                raise KPConfigError(f"{name}: can't be used together with {other}")
        sparse = values.get("sparse_attention", SparseAttentionConfig())
        if sparse.mode != "off":
            _check_chosen(name, getattr(settings, "schedule", "ring"), sparse)


def _check_chosen(name: str, schedule: str, sparse: SparseAttentionConfig) -> None:
    """Who chooses blocks has to see all keys, and knows of its own heads alone."""
    if schedule not in ("auto", "ulysses"):
        raise KPConfigError(
            f"{name}: can't be used together with sparse_attention, but by schedule='ulysses'"
        )
    if sparse.selector == "random":
        raise KPConfigError(f"{name}: can't be used together with sparse_attention.selector='random'")
    for setting in ("dense_heads", "gates", "calibration"):
        if getattr(sparse, setting):
            raise KPConfigError(f"{name}: can't be used together with sparse_attention.{setting}")


def _merge(values: dict[str, Any], sources: dict[str, str], key: str, value: Any, source: str) -> None:
    if key in PASS_CONFIGS:
        cls = PASS_CONFIGS[key]
        changes = _pass_settings(key, value)
        if changes and cls().mode == "off" and "mode" not in changes and f"{key}.mode" not in sources:
            changes["mode"] = "auto"  # who sets up a pass that is off by default asks for it
        values[key] = dataclasses.replace(values.get(key, cls()), **changes)
        sources.update({f"{key}.{name}": source for name in changes})
    elif key in GLOBAL_KEYS:
        values[key] = _checked(key, value, typing.get_type_hints(Config)[key])
        sources[key] = source
    else:
        raise KPConfigError(_unknown("option", key, (*PASS_CONFIGS, *GLOBAL_KEYS)))


def _pass_settings(name: str, value: Any) -> dict[str, Any]:
    """The settings of one pass from what the user wrote: a mode, a bool or a dict."""
    if isinstance(value, bool):
        return {"mode": "on" if value else "off"}
    if isinstance(value, str):
        return {"mode": _checked(name, value, Mode)}
    if not isinstance(value, Mapping):
        raise KPConfigError(
            f"{name}: got {value!r}, expected one of {_names(get_args(Mode))}, a bool or a dict"
        )
    hints = typing.get_type_hints(PASS_CONFIGS[name])
    for key in value:
        if key not in hints:
            raise KPConfigError(_unknown(f"{name} setting", key, tuple(hints)))
    given = {key: _checked(f"{name}.{key}", item, hints[key]) for key, item in value.items() if key != "mesh"}
    if value.get("mesh") is not None:
        from kp_compiler.sharding import ranks_of  # brings torch.distributed along: not at import time

        given["mesh"] = ranks_of(value["mesh"], f"{name}.mesh")
    for key, (fits, expected) in _RANGES.items():
        if given.get(key) is not None and not fits(given[key]):
            raise KPConfigError(f"{name}.{key}: got {given[key]:g}, expected {expected}")
    for product in given.get("fast_accum", ()):
        if product not in PRODUCTS:
            raise KPConfigError(_unexpected(f"{name}.fast_accum", product, PRODUCTS))
    if value and "mode" not in given and given.get("expect") is not None:
        given["mode"] = "require"
    return given


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "expect": (lambda x: x >= 0, "a number of sites"),
    "amax_history": (lambda x: x >= 1, "at least one step"),
    "fill_threshold": (lambda x: x < 0, "less than 0"),
    "sparsity": (lambda x: 0 <= x < 1, "a share of blocks, 0 or more and less than 1"),
    "mass": (lambda x: 0 < x <= 1, "a share of the probabilities, more than 0 and at most 1"),
    "error": (lambda x: x >= 0, "0 or more"),
    "sink_blocks": (lambda x: x >= 0, "0 or more"),
    "local_blocks": (lambda x: x >= 1, "at least the block of a query's own key"),
    "min_tokens": (lambda x: x >= 0, "0 or more"),
    "memory": (lambda x: x > 0, "GiB, more than 0"),
}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the hinted type, else KPConfigError. A single string serves where several may
    stand."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise KPConfigError(_unexpected(name, value, args))
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _checked(name, value, next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        items = (value,) if isinstance(value, args[0]) else value
        if isinstance(items, list | tuple) and all(type(item) is args[0] for item in items):
            return tuple(items)
        what = {str: "a string or a list of strings", int: "a whole number or a list of them"}[args[0]]
        raise KPConfigError(f"{name}: got {value!r}, expected {what}")
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, Mapping):
            return {
                _checked(f"{name}, a key", key, args[0]): _checked(f"{name}[{key!r}]", item, args[1])
                for key, item in value.items()
            }
        raise KPConfigError(f"{name}: got {value!r}, expected a dict")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and math.isnan(value):
        raise KPConfigError(f"{name}: got nan, expected a number")
    if hint is int and isinstance(value, bool):
        raise KPConfigError(f"{name}: got {value!r}, expected an int")
    if isinstance(value, hint):
        return value
    raise KPConfigError(f"{name}: got {value!r}, expected {'an' if hint is int else 'a'} {hint.__name__}")


def _from_env(text: str) -> dict[str, str]:
    """`+name,-name` as settings."""
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item[0] not in "+-":
            raise KPConfigError(f"KP_PASSES: got {item!r}, expected +name or -name")
        if item[1:] not in PASS_CONFIGS:
            raise KPConfigError("KP_PASSES: " + _unknown("pass", item[1:], tuple(PASS_CONFIGS)))
        found[item[1:]] = "on" if item[0] == "+" else "off"
    return found


def _check_inductor(mode: str | None, patches: Mapping[str, Any]) -> None:
    import torch._inductor as inductor

    modes = tuple(dict.fromkeys(("default", *inductor.list_mode_options())))
    if mode is not None and mode not in modes:
        raise KPConfigError(_unexpected("mode", mode, modes))
    known = tuple(inductor.list_options()) if patches else ()
    for key in patches:
        if not isinstance(key, str):
            raise KPConfigError(f"inductor: got the key {key!r}, expected names of Inductor's options")
        if key.replace("-", "_") not in known:
            raise KPConfigError(_unknown("inductor option", key, known, listed=False))


def _unknown(what: str, name: Any, known: tuple[str, ...], *, listed: bool = True) -> str:
    text = f"unknown {what} {name!r}"
    if listed:
        text += f", expected one of {_names(known)}"
    return text + _nearest(name, known)


def _unexpected(name: str, value: Any, known: tuple[Any, ...]) -> str:
    return f"{name}: got {value!r}, expected one of {_names(known)}" + _nearest(value, known)


def _nearest(name: Any, known: tuple[Any, ...]) -> str:
    close = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _names(known: tuple[Any, ...]) -> str:
    return ", ".join(repr(item) for item in known)
