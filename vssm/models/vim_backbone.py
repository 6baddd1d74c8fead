"""The backbone for dense prediction that Vim's authors published; the classifier that it stands on is in ``vim``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.layout import to_map
from vssm.layers.parts import check_choice
from vssm.models.backbone import TrunkMaps, pyramid

if TYPE_CHECKING:
    from vssm.models.vim import Vim


class VimBackbone(TrunkMaps):
    """Four maps of strides 4, 8, 16, 32 for detection and segmentation, from four depths of one stride.

    Args:
        trunk: A model of stride 16 or 8. It loses its class token and its classifier.
        out_indices: Blocks whose features become the four maps; a single one becomes all of them.
        features: What is taken at a block: ``"branch"``, what it adds, or ``"stream"``, the sum so far.
        last: The last block's feature with ``features="stream"``: ``"branch"``, ``"stream"``, or ``"norm"``: the
            normalised stream.
    """

    def __init__(
        self, trunk: Vim, out_indices: Sequence[int] = (5, 11, 17, 23), features: str = "branch", last: str = "branch"
    ):
        super().__init__(trunk)
        depth = len(trunk.blocks)
        if len(out_indices) not in (1, 4) or not all(0 <= i < depth for i in out_indices):
            raise ValueError(
                f"VimBackbone: out_indices must name one block or four of {depth}, got {tuple(out_indices)}"
            )
        check_choice("VimBackbone", "features", features, ("branch", "stream"))
        check_choice("VimBackbone", "last", last, ("branch", "stream", "norm"))
        trunk.remove_class_token()
        trunk.reset_classifier(0, "")
        self.out_indices, self.features, self.last = tuple(out_indices), features, last
        if features == "branch" or last != "norm":
            trunk.norm = nn.Identity()
        self.pyramid = nn.ModuleList(pyramid(trunk.embed_dim, trunk.patch_embed.stride))
        self.feature_info = [
            {"num_chs": trunk.embed_dim, "reduction": 4 * 2**i, "module": f"pyramid.{i}"} for i in range(4)
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, grid = self.trunk.embed(x)
        blocks, maps = self.trunk.blocks[: max(self.out_indices) + 1], {}
        for i, block in enumerate(blocks):
            saving = self.trunk.grad_checkpointing
            _, branch, x = checkpoint(block.step, x, grid) if saving else block.step(x, grid)
            if i in self.out_indices:
                maps[i] = to_map(self.feature(i, branch, x), grid)
        take = self.out_indices * 4 if len(self.out_indices) == 1 else self.out_indices
        return [level(maps[i]) for level, i in zip(self.pyramid, take, strict=True)]

    def feature(self, i: int, branch: Tensor, x: Tensor) -> Tensor:
        """Feature of block i, which added ``branch`` to the stream and left ``x``."""
        if self.features == "branch":
            return branch
        if i < len(self.trunk.blocks) - 1:
            turn = self.trunk.blocks[i + 1].turn_in
            return x if turn is None else turn(x)  # As published: as the next block reads it.
        return branch if self.last == "branch" else self.trunk.norm(x)
