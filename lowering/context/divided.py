"""How batches have been divided, so that attention that is shared in another way is an error, not a result.

A graph is compiled for a layout of a mesh, a batch is divided by a call of its own, and nothing in a tensor
says which tokens it has.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch.distributed as dist

from kp_compiler.errors import KPError

_layouts: weakref.WeakKeyDictionary[dist.ProcessGroup, set[str]] = weakref.WeakKeyDictionary()


def note(group: dist.ProcessGroup, layout: str) -> None:
    """A batch was divided among the ranks of `group`."""
    _layouts.setdefault(group, set()).add(layout)


def check(group: dist.ProcessGroup, layout: str, site: str) -> None:
    """Raises KPError where batches were divided by `shard_sequence`, and none of them so."""
    known = _layouts.get(group, set())
    if not _layouts or layout in known:
        return
    where = f"{site or 'a shared sequence'}: compiled for the layout {layout!r} among {group.size()} ranks"
    if known:
        raise KPError(
            f"{where}, which shard_sequence has divided as {_named(known)}: say the same layout to both"
        )
    sizes = sorted({other.size() for other in _layouts})
    raise KPError(
        f"{where}, and shard_sequence has divided batches among other groups, of {_named(sizes)} ranks: give "
        "both the same mesh"
    )


def _named(several: Sequence[object] | set[str]) -> str:
    return " and ".join(map(repr, several))
