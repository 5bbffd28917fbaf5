"""The ``reference`` backend of deep_ep: runs anywhere, and defines the numbers."""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
