"""Images to a map of patches."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One convolution without padding; patches overlap if ``stride`` is smaller than they are.

    (B, 3, H, W) to (B, C, h, w) with h = (H - patch_size) // stride + 1, and w likewise.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int | None = None):
        super().__init__()
        self.patch_size, self.stride = patch_size, stride or patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=self.stride)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of an image, (h, w)."""
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
