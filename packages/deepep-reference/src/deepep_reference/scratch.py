"""Memory that a user may overwrite between calls (`Buffer.get_local_buffer_tensor`)."""

from __future__ import annotations

import torch


class Scratch:
    """One tensor, made when first asked for and grown when asked for more. The backend itself never reads it."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def at_least(self, num_bytes: int) -> torch.Tensor:
        """uint8, at least ``num_bytes``; the same memory every time unless it had to grow."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self._memory.device)
        return self._memory

    def release(self) -> None:
        """Forget the memory."""
        self._memory = self._memory.new_empty(0)
