"""Errors users meet. Dynamo wraps them in `BackendCompilerFailed`; `.inner_exception` holds the original."""

from __future__ import annotations


class KPError(RuntimeError):
    """Base of every error kp raises on purpose."""


class KPConfigError(KPError, ValueError):
    """An option that kp does not know or a value it does not take."""


class KPExchangeError(KPError):
    """Ranks that share a sequence could not exchange tensors: one is gone, or did not answer in time."""


class KPRequirementError(KPError):
    """A flag set to `require` (or given `expect`) fired at too few sites."""
