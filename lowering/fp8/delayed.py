"""Delayed scaling: casts use scales from the largest magnitudes of earlier steps, so no pass over the data
comes before the cast (the method of NVIDIA's Transformer Engine, "DelayedScaling").

Each operator has three numbers to follow, the largest magnitude of x, of its weights and of dy. The compiled
graph reads their scales and writes what it saw into one-element tensors, both graph inputs; `DelayedScaling`
keeps a history of them and makes new scales before each training step, outside the graph, without waiting for
the device. A value that saturates is clamped; the next step knows of it. Infinities and NaN pass through the
cast, are counted, and do not enter the history.

State belongs to parameters: it survives recompilation, and `kp.state_dict` reaches it by parameter name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8 import linear
from kp_compiler.lowering.fp8.linear import Scale, finish, parse_spec, weight_cast
from kp_compiler.lowering.fp8.quantize import DTYPES, E4M3, fp8_amax, fp8_quantize
from kp_compiler.lowering.fp8.recipes import TENSOR, Fp8Spec
from kp_compiler.lowering.ops import fragment
from kp_compiler.target import has_package

ROLES = ("x", "w", "dy")
# The magnitudes that a first step is prepared for, where nothing is known: activations behind a norm stay
# below 64, gradients of a mean loss far below 1, and e5m2 keeps its precision down to 1e-9 of that.
_GUESS = {"x": 64.0, "w": 1.0, "dy": 1.0}

_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor scales, Tensor(a!)[] seen, str spec) -> Tensor[]"
)


@cache
def library() -> Any:
    """Registers the operator of this file, once."""
    return fragment("fp8_linear_delayed", _SCHEMA, {"CompositeImplicitAutograd": _linear})


def fp8_linear_delayed() -> Any:
    """`kp::fp8_linear`, with `scales` [6,4] given, the first numbers of the rows those of x, w and dy and
    their inverses, and the largest magnitudes written to `seen` [1] each; those of dy, and of w where dgrad
    casts it anyway, in the backward pass."""
    library()
    return torch.ops.kp.fp8_linear_delayed.default


def _linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: Tensor,
    seen: list[Tensor],
    spec: str,
) -> list[Tensor]:
    plan = parse_spec(spec)
    outs = _Delayed.apply(plan, x.reshape(-1, x.shape[-1]), scales, *seen, *weights)
    return finish(plan, x, outs if isinstance(outs, tuple) else (outs,), biases)


def _parts(scales: Tensor) -> list[Scale]:
    """The scales of x, w and dy, [1,1] each."""
    found = [scales[row : row + 1, :1] for row in range(2 * len(ROLES))]
    return [Scale(*pair) for pair in zip(found[: len(ROLES)], found[len(ROLES) :], strict=True)]


class _Delayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Fp8Spec, x: Tensor, scales: Tensor, *rest: Tensor) -> Any:
        (seen_x, seen_w, seen_dy), weights = rest[:3], rest[3:]
        scale_x, scale_w, _ = _parts(scales)
        quantized = fp8_quantize([x], scale_x.cast, E4M3, TENSOR)
        weight = weight_cast(plan, weights, scale_w)
        out = linear.fprop(plan, quantized, weight, scale_x.inverse, scale_w.inverse, x.shape[0])
        seen_x.copy_(fp8_amax([x]))
        late = ctx.needs_input_grad[1]  # dgrad's cast of the weights finds their maximum on the way
        if not late:
            seen_w.copy_(fp8_amax(list(weights), dim=plan.outputs_dim))
        ctx.plan, ctx.sizes, ctx.dtype = plan, [w.shape[plan.outputs_dim] for w in weights], x.dtype
        ctx.seen_dy, ctx.seen_w = seen_dy, seen_w if late else None
        kept, _ = linear.keep(plan, x, scale_x)
        ctx.save_for_backward(kept, scales, *weights)
        return out if len(weights) == 1 else out.split(ctx.sizes, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan: Fp8Spec = ctx.plan
        x, scales, *weights = ctx.saved_tensors
        scale_x, scale_w, scale_dy = _parts(scales)
        amax = fp8_amax(list(grads), dim=1)
        ctx.seen_dy.copy_(amax)
        if ctx.seen_w is not None:
            ctx.seen_w.copy_(fp8_amax(weights, dim=plan.outputs_dim))
        dx, dw = linear.gradients(
            plan, grads, scale_dy, x, scale_x, weights, scale_w, dtype=ctx.dtype, sizes=ctx.sizes,
            need_dx=ctx.needs_input_grad[1], need_dw=ctx.needs_input_grad[6:], after=amax,
        )  # fmt: skip
        return (None, dx, *[None] * 4, *dw)


# ---------------------------------------------------------------------------------------------------------
# the state


_LINE = 4  # float32 numbers of 16 bytes: compiled code copies an input that starts elsewhere


class Block:
    """The state of a graph's operators: history [steps, sites, 3] of largest magnitudes, what the last step
    saw, and how often a value saturated or was not finite, [sites, 3]."""

    def __init__(self, owners: Sequence[Tensor], length: int) -> None:
        device, sites = owners[0].device, len(owners)
        self.owners = [weakref.ref(owner) for owner in owners]
        self.history = torch.zeros(length, sites, len(ROLES), device=device)
        self.lines = torch.zeros(sites, len(ROLES), _LINE, device=device)
        self.seen = [[line[:1] for line in row] for row in self.lines]
        self.overflows = torch.zeros(sites, len(ROLES), dtype=torch.int64, device=device)
        self.scale = torch.zeros(sites, len(ROLES), device=device)  # of the last step; zeros before the first
        self.step = 0

    def alive(self) -> bool:
        return all(owner() is not None for owner in self.owners)

    def export(self, row: int) -> dict[str, Tensor]:
        """One site's state, as tensors of its own."""
        return {
            "amax_history": torch.roll(self.history[:, row], -self.step, 0).clone(),
            "amax": torch.cat(self.seen[row]).clone(),
            "overflows": self.overflows[row].clone(),
        }

    def restore(self, row: int, state: dict[str, Tensor]) -> None:
        """Put an exported state back; a history of another length keeps its newest entries."""
        given = state["amax_history"].to(self.history)
        length = min(len(given), len(self.history))
        self.history[:, row] = 0.0
        places = [(self.step - 1 - age) % len(self.history) for age in range(length)]
        self.history[places, row] = given.flip(0)[:length]
        for tensor, value in zip(self.seen[row], state["amax"].to(self.history), strict=True):
            tensor.copy_(value)
        self.overflows[row] = state["overflows"].to(self.overflows)

    def next_scales(self, limits: Tensor, guess: Tensor, headroom: float, *, reduce: bool) -> list[Tensor]:
        """Take in what the last step saw, and the scales of the next with their inverses, [6,4] a site, in
        memory of their own: a backward pass may still come that reads the last ones."""
        seen = _reduced(self.lines) if reduce else self.lines
        entry = self.step % len(self.history)
        self.step += 1
        update = _updater(seen.device.type)
        lines = update(seen, self.history, entry, self.scale, self.overflows, limits, guess, headroom)
        return list(lines.unbind())


@cache
def _updater(device: str) -> Callable[..., Tensor]:
    if device == "cuda" and has_package("triton"):
        from kp_compiler.lowering.triton.delayed_scales import update

        return update
    return updated


def updated(
    seen: Tensor,
    history: Tensor,
    entry: int,
    scale: Tensor,
    overflows: Tensor,
    limits: Tensor,
    guess: Tensor,
    headroom: float,
) -> Tensor:
    """The reference of `triton.delayed_scales.update`."""
    top = seen[..., 0]
    overflows += ~(top * scale <= limits)
    torch.nan_to_num(top, nan=0.0, posinf=0.0, neginf=0.0, out=history[entry])
    amax = history.amax(0)
    torch.div(limits, torch.where(amax > 2.0**-100, amax * headroom, guess), out=scale)
    both = torch.cat([scale, scale.reciprocal()], dim=1)
    return both.unsqueeze(-1).expand(-1, -1, seen.shape[2]).contiguous()


def _reduced(seen: Tensor) -> Tensor:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        seen = seen.clone()
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen


_Key = tuple[int, int]  # a parameter's identity, and which of its uses
_blocks: dict[tuple[_Key, ...], Block] = {}
_pending: dict[_Key, tuple[weakref.ref[Tensor], dict[str, Tensor]]] = {}


def _block(keys: tuple[_Key, ...], owners: list[Tensor], length: int, first: list[list[Tensor]]) -> Block:
    """The state of these sites: kept from earlier graphs, loaded, or new."""
    found = _blocks.get(keys)
    if found is not None and all(o() is owner for o, owner in zip(found.owners, owners, strict=True)):
        return found
    for key in [key for key, block in _blocks.items() if not block.alive()]:
        del _blocks[key]
    block = Block(owners, length)
    for row, (site, owner, weights) in enumerate(zip(keys, owners, first, strict=True)):
        state = _state_of(site, owner)
        if state is not None:
            block.restore(row, state)
        else:
            block.seen[row][1].copy_(torch.stack([w.detach().abs().amax().float() for w in weights]).amax())
    _blocks[keys] = block
    return block


def _state_of(key: _Key, owner: Tensor) -> dict[str, Tensor] | None:
    if key in _pending and _pending[key][0]() is owner:
        return _pending[key][1]
    found = [block.export(row) for block, row in _places(key, owner)]
    return found[-1] if found else None


def _places(key: _Key, owner: Tensor) -> Iterator[tuple[Block, int]]:
    for keys, block in _blocks.items():
        for row, each in enumerate(keys):
            if each == key and block.owners[row]() is owner:
                yield block, row


class DelayedScaling:
    """The provider of scales and of the tensors that magnitudes are written to, for all sites of a graph."""

    def __init__(self, length: int, margin: int, limits: tuple[float, ...], *, reduce: bool) -> None:
        self.length, self.headroom, self.limits, self.reduce = length, 2.0**margin, limits, reduce
        self.sites: list[tuple[tuple[int, ...], int]] = []  # positions of a site's weights, which use it is
        self.constants: tuple[Tensor, Tensor] | None = None  # limits and guesses, on the device

    def add(self, positions: tuple[int, ...]) -> None:
        use = sum(first[0] == positions[0] for first, _ in self.sites)
        self.sites.append((positions, use))

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        weights = [[args[position] for position in positions] for positions, _ in self.sites]
        owners = [each[0] for each in weights]
        keys = tuple((id(owner), use) for owner, (_, use) in zip(owners, self.sites, strict=True))
        with torch.no_grad():
            block = _block(keys, owners, self.length, weights)
            if self.constants is None or self.constants[0].device != owners[0].device:
                numbers = (self.limits, tuple(_GUESS[role] for role in ROLES))
                limits, guess = (torch.tensor(each, device=owners[0].device) for each in numbers)
                self.constants = limits, guess
            scales = block.next_scales(*self.constants, self.headroom, reduce=self.reduce)
        return [tensor for scale, seen in zip(scales, block.seen, strict=True) for tensor in (scale, *seen)]


def limits_of(plan: Fp8Spec) -> tuple[float, ...]:
    """The largest FP8 number of each role."""
    return tuple(torch.finfo(dtype).max for dtype in (E4M3, E4M3, DTYPES[plan.grad_dtype]))


def fake_inputs(like: Tensor) -> list[Tensor]:
    """Values for one site's inputs: the scales, and three one-element tensors."""
    scales = like.new_empty((2 * len(ROLES), _LINE), dtype=torch.float32)
    return [scales] + [like.new_empty((1,), dtype=torch.float32) for _ in ROLES]


def state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state of delayed scaling of a module (compiled or not), by parameter name: for each site
    `NAME.fp8_amax_history` [steps, 3], oldest first, `NAME.fp8_amax` [3] of the last step, and
    `NAME.fp8_overflows` [3], how many steps had a value that saturated or was not finite; columns are x, w
    and dy. A weight that several sites use has `NAME.fp8_1_…` and so on for the later ones. Weights that are
    one product are found under the first one's name. Tensors are copies.
    """
    found = {}
    for name, parameter in _named_parameters(module):
        for key in sorted({key for keys in _blocks for key in keys if key[0] == id(parameter)}):
            state = _state_of(key, parameter)
            use = f"{key[1]}_" if key[1] else ""
            found.update({f"{name}.fp8_{use}{what}": value for what, value in (state or {}).items()})
    return found


def load_state_dict(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `state_dict` returned, before or after the module was compiled. Raises KeyError for names
    that belong to none of the module's parameters, and for incomplete entries."""
    parameters = dict(_named_parameters(module))
    entries: dict[tuple[str, int], dict[str, Tensor]] = {}
    for full, value in state.items():
        name, mark, what = full.rpartition(".fp8_")
        use, _, rest = what.partition("_")
        number, what = (int(use), rest) if use.isdigit() else (0, what)
        if not mark or name not in parameters or what not in ("amax_history", "amax", "overflows"):
            raise KeyError(f"load_state_dict: {full!r} names no FP8 state of a parameter of this module")
        entries.setdefault((name, number), {})[what] = value
    for (name, number), entry in entries.items():
        if len(entry) != 3:
            raise KeyError(f"load_state_dict: the FP8 state of {name!r} is incomplete: {sorted(entry)}")
        owner = parameters[name]
        key = (id(owner), number)
        _pending[key] = (weakref.ref(owner), {what: value.clone() for what, value in entry.items()})
        for block, row in _places(key, owner):
            block.restore(row, entry)


def _named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    module = getattr(module, "_orig_mod", module)
    yield from module.named_parameters(remove_duplicate=False)
