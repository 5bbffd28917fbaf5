"""Facts about the kernel packages that are installed, asked without touching CUDA."""

from __future__ import annotations

import torch

from . import registry
from .errors import DeepEPError


def is_sm90_compiled() -> bool:
    """True where CUDA is absent, or an installed kernel backend was built with SM90 features."""
    if not torch.cuda.is_available():
        return True
    for name in registry.installed_names():
        try:
            backend = registry.load(name)
        except DeepEPError:
            continue
        if backend.is_sm90_compiled():
            return True
    return False
