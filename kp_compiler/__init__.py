"""kp: a torch.compile backend that proves attention masks and rewrites attention onto the fastest exact
kernels.

    import torch
    model = torch.compile(model, backend="kp")

`import kp_compiler as kp` gives the tools around it: plan, explain, capture_reports, options.
"""

from __future__ import annotations

from kp_compiler.backend import kp
from kp_compiler.calibrate import calibrate
from kp_compiler.capture import capture_reports, explain, plan
from kp_compiler.config import options
from kp_compiler.documents import document_order
from kp_compiler.efficiency import Efficiency, attention_efficiency
from kp_compiler.errors import KPConfigError, KPError, KPExchangeError, KPRequirementError
from kp_compiler.lowering.fp8.state import load_state_dict, state_dict
from kp_compiler.report import Rejection, Report, SiteRecord
from kp_compiler.sharding import sequence_mean, shard_sequence, shifted_labels, unshard_sequence
from kp_compiler.shared_inference import SharedInference, shared_inference
from kp_compiler.train_selectors import train_selectors
from kp_compiler.validate_context import ContextCheck, Memory, estimate_memory, validate_context_parallel

__version__ = "0.1.0"
__all__ = [
    "ContextCheck",
    "Efficiency",
    "KPConfigError",
    "KPError",
    "KPExchangeError",
    "KPRequirementError",
    "Memory",
    "Rejection",
    "Report",
    "SharedInference",
    "SiteRecord",
    "attention_efficiency",
    "calibrate",
    "capture_reports",
    "document_order",
    "estimate_memory",
    "explain",
    "kp",
    "load_state_dict",
    "options",
    "plan",
    "sequence_mean",
    "shard_sequence",
    "shared_inference",
    "shifted_labels",
    "state_dict",
    "train_selectors",
    "unshard_sequence",
    "validate_context_parallel",
]
