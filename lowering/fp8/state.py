"""What delayed scaling remembers: histories of largest magnitudes, and the scales they make.

State belongs to parameters: it survives recompilation, and `kp.state_dict` reaches it by parameter name, also
under FSDP2. New scales are made before each step without waiting for the device. Magnitudes that are not
finite are counted, and do not enter the history.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kp_compiler.lowering.fp8.quantize import DTYPES, E4M3
from kp_compiler.lowering.fp8.recipes import Fp8Spec
from kp_compiler.target import has_package

ROLES = ("x", "w", "dy")
# The magnitudes that a first step is prepared for, where nothing is known: activations behind a norm stay
# below 64, gradients of a mean loss far below 1, and e5m2 keeps its precision down to 1e-9 of that.
_GUESS = {"x": 64.0, "w": 1.0, "dy": 1.0}

_LINE = 4  # float32 numbers of 16 bytes: compiled code copies an input that starts elsewhere


UNSEEN = -1.0  # in place of a magnitude: nothing since scales were made


class Block:
    """The state of a graph's operators: history [steps, sites, 3] of largest magnitudes, what was seen since
    the last step began, in as many passes as there were, and how often a value saturated or was not finite,
    [sites, 3]."""

    def __init__(self, owners: Sequence[Tensor], length: int) -> None:
        device, sites = owners[0].device, len(owners)
        self.owners = [weakref.ref(owner) for owner in owners]
        self.history = torch.zeros(length, sites, len(ROLES), device=device)
        self.lines = torch.full((sites, len(ROLES), _LINE), UNSEEN, device=device)
        self.seen = [[line[:1] for line in row] for row in self.lines]
        self.overflows = torch.zeros(sites, len(ROLES), dtype=torch.int64, device=device)
        self.scale = torch.zeros(sites, len(ROLES), device=device)  # of the last step; zeros before the first
        self.step = 0

    def alive(self) -> bool:
        return all(owner() is not None for owner in self.owners)

    def serves(self, owners: Sequence[Tensor], length: int) -> bool:
        """Whether it is the state of these, where they are now."""
        same = all(mine() is owner for mine, owner in zip(self.owners, owners, strict=True))
        return same and len(self.history) == length and self.history.device == owners[0].device

    def export(self, row: int) -> dict[str, Tensor]:
        """One site's state, as tensors of its own."""
        history = torch.roll(self.history[:, row], -self.step, 0)
        seen = torch.cat(self.seen[row])
        return {
            "amax_history": history,
            "amax": torch.where(seen == UNSEEN, history[-1], seen),
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
        self.scale[row] = 0.0

    def next_scales(self, limits: Tensor, guess: Tensor, headroom: float, *, reduce: bool) -> list[Tensor]:
        """Take in what was seen, and the scales of the next step with their inverses, [6,4] a site, in memory
        of their own: a backward pass may still come that reads the last ones."""
        if reduce:
            _reduce(self.lines)
        entry = self.step % len(self.history)
        self.step += 1
        update = _updater(self.lines.device.type)
        lines = update(self.lines, self.history, entry, self.scale, self.overflows, limits, guess, headroom)
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
    top = torch.where(seen[..., 0] == UNSEEN, history[entry], seen[..., 0])
    overflows += ~(top * scale <= limits) & (seen[..., 0] != UNSEEN)
    seen.fill_(UNSEEN)
    torch.nan_to_num(top, nan=0.0, posinf=0.0, neginf=0.0, out=history[entry])
    amax = history.amax(0)
    torch.div(limits, torch.where(amax > 2.0**-100, amax * headroom, guess), out=scale)
    both = torch.cat([scale, scale.reciprocal()], dim=1)
    return both.unsqueeze(-1).expand(-1, -1, seen.shape[2]).contiguous()


def _reduce(seen: Tensor) -> None:
    """The largest of all processes."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)


_Key = tuple[int, int]  # a parameter's identity, and which of its uses
_blocks: dict[tuple[_Key, ...], Block] = {}


@dataclass
class _Loaded:
    """A state that waits for the graph that will use it."""

    owner: Callable[[], Tensor | None]
    use: int
    state: dict[str, Tensor]

    def belongs_to(self, key: _Key, owner: Tensor) -> bool:
        return self.use == key[1] and self.owner() is owner


_loaded: list[_Loaded] = []


def _block(keys: tuple[_Key, ...], owners: list[Tensor], length: int, first: list[list[Tensor]]) -> Block:
    """The state of these sites: kept from earlier graphs, loaded, or new."""
    found = _blocks.get(keys)
    if found is not None and found.serves(owners, length):
        return found
    for key in [key for key, block in _blocks.items() if not block.alive()]:
        del _blocks[key]
    block = Block(owners, length)
    for row, (site, owner, weights) in enumerate(zip(keys, owners, first, strict=True)):
        state = _state_of(site, owner)
        if state is not None:
            block.restore(row, state)
            _loaded[:] = [each for each in _loaded if not each.belongs_to(site, owner)]
        else:
            block.seen[row][1].copy_(torch.stack([w.detach().abs().amax().float() for w in weights]).amax())
    _blocks[keys] = block
    return block


def _state_of(key: _Key, owner: Tensor) -> dict[str, Tensor] | None:
    """As some graph has it, or as it was loaded before there was one."""
    found = [block.export(row) for block, row in _places(key, owner)]
    found = found or [each.state for each in _loaded if each.belongs_to(key, owner)]
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
    one product are found under the first one's name. Tensors are copies. Under FSDP2 every process has the
    whole state, of its own activations (`reduce_amax=True`: of all).
    """
    found = {}
    for name, owner in _named_owners(module):
        parameter = owner()
        uses = {key[1] for keys in _blocks for key in keys if key[0] == id(parameter)}
        uses |= {each.use for each in _loaded if parameter is not None and each.owner() is parameter}
        for number in sorted(uses):
            assert parameter is not None
            state = _state_of((id(parameter), number), parameter)
            use = f"{number}_" if number else ""
            found.update({f"{name}.fp8_{use}{what}": value for what, value in (state or {}).items()})
    return found


def load_state_dict(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `state_dict` returned, before or after the module was compiled. Raises KeyError for names
    that belong to none of the module's parameters, and for incomplete entries."""
    owners = dict(_named_owners(module))
    entries: dict[tuple[str, int], dict[str, Tensor]] = {}
    for full, value in state.items():
        name, mark, what = full.rpartition(".fp8_")
        use, _, rest = what.partition("_")
        number, what = (int(use), rest) if use.isdigit() else (0, what)
        if not mark or name not in owners or what not in ("amax_history", "amax", "overflows"):
            raise KeyError(f"load_state_dict: {full!r} names no FP8 state of a parameter of this module")
        entries.setdefault((name, number), {})[what] = value
    for (name, _), entry in entries.items():
        if len(entry) != 3:
            raise KeyError(f"load_state_dict: the FP8 state of {name!r} is incomplete: {sorted(entry)}")
    for (name, number), entry in entries.items():
        _load(owners[name], number, entry)


def _load(owner: Callable[[], Tensor | None], use: int, state: dict[str, Tensor]) -> None:
    parameter = owner()
    places = [] if parameter is None else list(_places((id(parameter), use), parameter))
    for block, row in places:
        block.restore(row, state)
    if not places:
        _loaded.append(_Loaded(owner, use, {what: value.clone() for what, value in state.items()}))


def _named_owners(module: torch.nn.Module) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """Names of parameters, and what finds the tensor that a compiled graph sees as that parameter."""
    module = getattr(module, "_orig_mod", module)
    gathered = {id(each.sharded_param): each for each in _sharded(module)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        sharded = gathered.get(id(parameter))
        yield name, weakref.ref(parameter) if sharded is None else _Gathered(weakref.ref(sharded))


@dataclass(frozen=True)
class _Gathered:
    """The whole of a parameter that FSDP2 shards. There is none before the first forward pass."""

    sharded: Callable[[], Any]

    def __call__(self) -> Tensor | None:
        return getattr(self.sharded(), "_unsharded_param", None)


def _sharded(module: torch.nn.Module) -> Iterator[Any]:
    """FSDP2's records of the parameters it shards; it has no public way from one to its gathered tensor."""
    for each in module.modules():
        if hasattr(each, "_get_fsdp_state"):
            state = each._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (p for group in groups if group is not None for p in group.fsdp_params)
