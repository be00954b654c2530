"""The file that `kp.train_selectors` writes: a pair of gates for each attention site, in safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from kp_compiler.errors import KPConfigError
from kp_compiler.target import has_package

Gates = Mapping[str, tuple[Tensor, Tensor]]  # [H,D,r] and [H,3·D,r] in float32, by module path
_KINDS = ("queries", "keys")


def save(found: Gates, path: str | Path) -> None:
    check_installed()
    from safetensors.torch import save_file

    names = {
        f"{module}/{kind}": x for module, pair in found.items() for kind, x in zip(_KINDS, pair, strict=True)
    }
    save_file({name: x.detach().float().cpu().contiguous() for name, x in names.items()}, path)


def check_installed() -> None:
    if not has_package("safetensors"):
        raise KPConfigError("gates are kept in safetensors, which is not installed: pip install safetensors")


def load(path: str) -> Gates:
    """Raises KPConfigError where the file is none of `kp.train_selectors`'."""
    try:
        return _load(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise KPConfigError(f"sparse_attention.gates: {path} can't be read: {error}") from None


@lru_cache(maxsize=16)
def _load(path: str, changed: int) -> Gates:
    check_installed()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        modules = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
        return {module: tuple(tensors[f"{module}/{kind}"] for kind in _KINDS) for module in modules}  # type: ignore[misc]
    except (SafetensorError, KeyError):
        raise KPConfigError(
            f"sparse_attention.gates: {path} is no file that kp.train_selectors wrote"
        ) from None
