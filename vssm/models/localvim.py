"""LocalVim, the isotropic host of LocalMamba (arXiv:2403.09338); its rows and key names are in ``localmamba``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import (
    LayerNorm,
    RmsNorm,
    apply_rot_embed,
    lecun_normal_,
    to_2tuple,
)
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.block import TokenBlock
from vssm.layers.init import linear_like_transformers, ssm_like_transformers
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.local_mixer import Directions, local_mixers
from vssm.layers.norm import TOKEN_NORMS
from vssm.layers.parts import check_choice
from vssm.layers.patch import PatchEmbed
from vssm.layers.position import (
    CLASS_TOKENS,
    Rotary,
    insert_class_tokens,
    positions,
    resize_tokens,
    turns,
)
from vssm.layers.ssm import ssm_parameters
from vssm.models.backbone import TrunkMaps
from vssm.models.base import Isotropic, drop_path_rates, linear_head

EPS = 1e-5
torch.fx.wrap("positions")
NORMS = {"rms": RmsNorm, "layer": LayerNorm}
POOLS = ("avg", "token", "last", "")

SEARCHED = (
    "h v_flip w7 w7_flip", "h_flip w2_flip w7 w7_flip", "h h_flip v w7", "h h_flip v v_flip", "h h_flip v v_flip",
    "h h_flip v v_flip", "h_flip v v_flip w7", "h_flip v v_flip w2_flip", "h h_flip v v_flip", "h h_flip v v_flip",
    "h v v_flip w2", "h v v_flip w2_flip", "h h_flip v_flip w7", "h_flip v v_flip w2", "h h_flip v v_flip",
    "h v w2 w2_flip", "v v_flip w2 w7", "h h_flip v w2", "h h_flip w2_flip w7", "v v_flip w2 w2_flip",
)  # fmt: skip


class PaddedPatchEmbed(PatchEmbed):
    """Patches that touch; the image is padded with zeros at the right and below. (B, 3, H, W) to (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        # Not -size % p: torch.compile has no such remainder of symbols.
        bottom, right = (self.patch_size - 1 - (size - 1) % self.patch_size for size in (x.shape[2], x.shape[3]))
        return self.proj(nn.functional.pad(x, (0, right, 0, bottom)))


class ResizedRotary(Rotary):
    """Rotary embedding whose table is that of one grid. On others, as published, sines and cosines are resized."""

    grid: tuple[int, ...]

    def set_grid(self, grid: Sequence[int]) -> None:
        self.grid = tuple(grid)
        super().set_grid(grid)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        grid = self.grid if grid is None else grid
        sin, cos = (positions(table[None], self.grid, grid)[0] for table in (self.sin, self.cos))
        return apply_rot_embed(x, sin, cos)


@torch.fx.wrap
def check_grid(grid: Sequence[int], own: Sequence[int], patch_size: int) -> None:
    """Refuse images of another grid than the model's."""
    if tuple(grid) != tuple(own):
        raise ValueError(
            f"LocalVim: with a class token the position table is of one size; images must have {own[0]} x {own[1]} "
            f"patches of {patch_size} pixels, got {grid[0]} x {grid[1]}; create the model with img_size=, or call "
            "set_input_size"
        )


class LocalVim(Isotropic):
    """LocalVim classifier. The defaults are ``localvim_tiny``.

    Without a class token it takes images of any size: tables of positions are resized in every forward pass.

    Args:
        img_size: Size of the images that the tables are for, one number or (H, W).
        in_chans, num_classes, drop_rate, drop_path_rate: As in timm.
        global_pool: ``"avg"``: mean of the patches; ``"token"``: the class token; ``"last"``: the last token;
            ``""``: none, the head sees every token.
        patch_size: Pixels of the image to one patch, each way.
        embed_dim, depth: Channels and blocks.
        directions: What each block reads, see ``vssm.scans.local``; one choice for all of them, or one a block. None:
            all eight that were published, weighted, to search among them.
        scan, scan_options: A registered order to read in the place of ``"local"`` and its directions.
        class_token: ``"middle"`` or None.
        rope: Rotary embedding before each block, of the whole ``"stream"`` or only of what the last ``"block"`` added.
        norm: ``"rms"`` or ``"layer"``.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 20,
        directions: Directions = SEARCHED,
        scan: str = "local",
        scan_options: Mapping[str, Any] | None = None,
        class_token: str | None = None,
        rope: str | None = "stream",
        norm: str = "rms",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_choice("LocalVim", "class_token", class_token, ("middle", None))
        check_choice("LocalVim", "norm", norm, NORMS)
        check_choice("LocalVim", "rope", rope, ("stream", "block", None))
        _check_pool(global_pool, class_token)
        if rope and class_token:
            raise ValueError("LocalVim: rope turns patches only; pass rope=None or class_token=None")
        self.class_token = class_token
        self.patch_embed = PaddedPatchEmbed(in_chans, embed_dim, patch_size)
        self.grid = self._grid(img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        length = math.prod(self.grid) + CLASS_TOKENS[class_token]
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim))
        self.rope = ResizedRotary(embed_dim, self.grid) if rope else None

        make_mixer = local_mixers(scan, scan_options, directions, depth, "sequence", class_token=class_token)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            turn_in, turn_out = turns(self.rope, rope, i, depth)
            block_norm = TOKEN_NORMS[norm](embed_dim, eps=EPS)
            mixer = make_mixer(i, embed_dim)
            self.blocks.append(TokenBlock(block_norm, mixer, rate, turn_in=turn_in, turn_out=turn_out))
        self.norm = NORMS[norm](embed_dim, eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(embed_dim, num_classes)
        self.describe(embed_dim, patch_size, num_classes, global_pool)
        self.init_weights()

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        # As published: whole patches alone count for the tables, though an image is padded.
        grid = self.patch_embed.grid(*to_2tuple(img_size))
        if min(grid) < 1:
            patch = self.patch_embed.patch_size
            raise ValueError(f"LocalVim: img_size must be at least one patch ({patch}) each way, got {img_size}")
        return grid

    def init_weights(self) -> None:
        self.apply(linear_like_transformers)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # As published: the rule for linear layers comes last and overwrites Mamba's step sizes.
        self.apply(ssm_like_transformers)
        for block in self.blocks:
            weight = block.mixer.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight.div_(math.sqrt(len(self.blocks)))

    def embed(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        x = self.patch_embed(x)
        grid = x.shape[2:]
        x = to_tokens(x)
        if self.class_token is None:
            return x + positions(self.pos_embed, self.grid, grid), grid
        check_grid(grid, self.grid, self.patch_embed.patch_size)
        return insert_class_tokens(x, self.cls_token.expand(x.shape[0], -1, -1), "middle") + self.pos_embed, grid

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return self.class_tokens(x)[:, 0]
        if self.global_pool == "avg":
            return self.patches(x).mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool, self.class_token)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make the tables those of other images: positions are resized, angles computed."""
        old, self.grid = self.grid, self._grid(img_size)
        with torch.no_grad():
            table = resize_tokens(self.pos_embed, old, self.grid, self.class_token)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.set_grid(self.grid)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log is decayed."""
        tokens = {"cls_token"} if self.class_token else set()
        return {"pos_embed", *tokens, *ssm_parameters(self, "D", "dt_bias")}


def _check_pool(global_pool: str, class_token: str | None) -> None:
    check_choice("LocalVim", "global_pool", global_pool, POOLS)
    if global_pool == "token" and class_token is None:
        raise ValueError("LocalVim: global_pool='token' needs class_token='middle'; pass global_pool='avg'")


class LocalVimBackbone(TrunkMaps):
    """Maps of one stride: what the blocks ``out_indices`` add to the stream, each under a norm of its own.

    Args:
        trunk: A classifier without class token, which loses its last norm and its head.
        out_indices: Blocks.
    """

    def __init__(self, trunk: LocalVim, out_indices: Sequence[int] = (4, 9, 14, 19)):
        super().__init__(trunk)
        if not all(0 <= i < len(trunk.blocks) for i in out_indices):
            raise ValueError(
                f"LocalVimBackbone: out_indices must name blocks 0 to {len(trunk.blocks) - 1}, got {tuple(out_indices)}"
            )
        if trunk.class_token is not None:
            raise ValueError("LocalVimBackbone: the trunk must have no class token, got class_token='middle'")
        self.out_indices = tuple(out_indices)
        trunk.reset_classifier(0, "")
        trunk.norm = nn.Identity()
        self.out_norms = nn.ModuleList(LayerNorm(trunk.embed_dim, eps=EPS) for _ in self.out_indices)
        self.feature_info = [trunk.feature_info[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, grid = self.trunk.embed(x)
        found = {}
        for i, block in enumerate(self.trunk.blocks[: max(self.out_indices) + 1]):
            saving = self.trunk.grad_checkpointing
            _, branch, x = checkpoint(block.step, x, grid) if saving else block.step(x, grid)
            if i in self.out_indices:
                found[i] = branch
        return [to_map(norm(found[i]), grid) for i, norm in zip(self.out_indices, self.out_norms, strict=True)]
