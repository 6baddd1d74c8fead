"""Vim: Vision Mamba, an isotropic bidirectional Mamba (Zhu et al., ICML 2024, arXiv:2401.09417).

Patches and a class token in their middle, blocks of norm and mixer with no MLP, a linear classifier on the class token.
Published code and weights: github.com/hustvl/Vim (Apache-2.0, both). Same function; other key names, see KEYS.

``*_stride8`` are the published "+" models: the same patches, overlapping by half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import (
    LayerNorm,
    LayerScale,
    RmsNorm,
    lecun_normal_,
    to_2tuple,
)
from torch import Tensor, nn

from vssm.layers.block import TokenBlock
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import TOKEN_NORMS
from vssm.layers.parts import check_choice
from vssm.layers.patch import PatchEmbed
from vssm.layers.position import (
    CLASS_TOKENS,
    ROTARY_GRID,
    Rotary,
    insert_class_tokens,
    resize_tokens,
    split_class_tokens,
    turns,
)
from vssm.layers.ssm import ssm_parameters
from vssm.models.backbone import pyramid, quarters, run_blocks, run_features
from vssm.models.base import Isotropic, drop_path_rates, linear_head
from vssm.models.keys import Rule, drop, rename, reshape, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights, nothing_left
from vssm.models.vim_backbone import VimBackbone

REPOSITORY = "hustvl/Vim"
EPS = 1e-5
torch.fx.wrap("resize_tokens")
NORMS = {"rms": RmsNorm, "layer": LayerNorm}
POOLS = ("token", "avg", "last", "logit_max", "")


class Vim(Isotropic):
    """Vim classifier. The defaults are ``vim_tiny``.

    Args:
        img_size: Size of the images, one number or (H, W); the position table is of that size.
        in_chans, num_classes, drop_rate, drop_path_rate: As in timm.
        global_pool: ``"token"``: the class token, or the mean of two; ``"avg"``: mean of the patches; ``"last"``: the
            last token; ``"logit_max"``: maximum of all tokens' logits; ``""``: none, the head sees every token.
        patch_size, stride: Of the patches, in pixels; they touch if ``stride`` is None.
        embed_dim, depth: Channels and blocks.
        d_state, expand, scan, scan_options: Of the mixers, see ``ScanMixer``.
        merge: ``"mean"`` or ``"sum"`` of the directions.
        shared: The directions share all parameters but their decay.
        class_token: Where it lies among the patches: ``"middle"``, ``"first"``, ``"ends"`` (two) or None.
        pos_embed: Learn a table of positions.
        rope: Rotary embedding before each block, of the whole ``"stream"`` or only of what the last ``"block"`` added.
        norm: ``"rms"`` or ``"layer"``.
        layer_scale: Initial factor of what a block adds, learned by channel; None for no factor.
        dynamic_img_size: Take images of any size, resizing the position table in every forward pass.
        class_row: How tables are resized, see ``resize_tokens``: ``"own"`` is right, ``"first"`` as published.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        patch_size: int = 16,
        stride: int | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        expand: float = 2.0,
        scan: str = "bidirectional",
        scan_options: Mapping[str, Any] | None = None,
        merge: str = "mean",
        shared: bool = False,
        class_token: str | None = "middle",
        pos_embed: bool = True,
        rope: str | None = None,
        norm: str = "rms",
        layer_scale: float | None = None,
        dynamic_img_size: bool = False,
        class_row: str = "own",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        _check_options(global_pool, class_token, rope, dynamic_img_size)
        check_choice("Vim", "norm", norm, NORMS)
        check_choice("Vim", "class_row", class_row, ("own", "first"))
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.class_token, self.class_row, self.dynamic_img_size = class_token, class_row, dynamic_img_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stride)
        self.grid = self._grid()
        extra = CLASS_TOKENS[class_token]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if extra else None
        self.cls_token_tail = nn.Parameter(torch.empty(1, 1, embed_dim)) if extra == 2 else None
        length = math.prod(self.grid) + extra
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim)) if pos_embed else None
        self.rope = Rotary(embed_dim, self.grid, skip=extra) if rope else None

        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            mixer = ScanMixer(
                embed_dim, scan=scan, scan_options=scan_options, expand=expand, d_state=d_state,
                conv="sequence", conv_size=4, merge=merge, class_token=class_token, shared=shared,
            )  # fmt: skip
            scale = None if layer_scale is None else LayerScale(embed_dim, layer_scale)
            turn_in, turn_out = turns(self.rope, rope, i, depth)
            self.blocks.append(
                TokenBlock(
                    TOKEN_NORMS[norm](embed_dim, eps=EPS), mixer, rate,
                    layer_scale=scale, turn_in=turn_in, turn_out=turn_out,
                )
            )  # fmt: skip
        self.norm = NORMS[norm](embed_dim, eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(embed_dim, num_classes)
        self.describe(embed_dim, self.patch_embed.stride, num_classes, global_pool)
        self.init_weights()

    def _grid(self) -> tuple[int, int]:
        grid, patch = self.patch_embed.grid(*self.img_size), self.patch_embed.patch_size
        if min(grid) < 1:
            raise ValueError(f"Vim: img_size must be at least one patch ({patch}) each way, got {self.img_size}")
        return grid

    def init_weights(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for table in (self.pos_embed, self.cls_token, self.cls_token_tail):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for block in self.blocks:
            mixer = block.mixer
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))
                if mixer.scan == "bidirectional" and not mixer.ssm.shared:
                    mixer.ssm.dt_bias[1].zero_()  # As published: the general rule for biases resets the backward one.

    def embed(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        if not self.dynamic_img_size:
            check_size(x.shape, self.img_size)
        x = self.patch_embed(x)
        grid = x.shape[2:]
        x = to_tokens(x)
        if self.class_token is not None:
            tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.cls_token_tail) if t is not None]
            x = insert_class_tokens(x, torch.cat(tokens, 1), self.class_token)
        if self.pos_embed is not None:
            table: Tensor = self.pos_embed
            if self.dynamic_img_size:
                table = resize_tokens(table, self.grid, grid, self.class_token, self.class_row)
            x = x + table
        return x, grid

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            tokens = self.class_tokens(x)
            return tokens.mean(1) if self.class_token == "ends" else tokens[:, 0]
        if self.global_pool == "avg":
            return self.patches(x).mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits)
        return x.amax(1) if self.global_pool == "logit_max" and not pre_logits else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_options(global_pool, self.class_token)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Change the size of the images; the position table is resized."""
        self.img_size = to_2tuple(img_size)
        old, self.grid = self.grid, self._grid()
        if self.pos_embed is not None:
            with torch.no_grad():
                table = resize_tokens(self.pos_embed, old, self.grid, self.class_token, self.class_row)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.set_grid(self.grid)

    def remove_class_token(self) -> None:
        """Go on with the patches alone, as dense prediction does; the classifier then sees their mean."""
        if self.pos_embed is not None:
            count = CLASS_TOKENS[self.class_token]
            own = split_class_tokens(self.pos_embed, self.class_token)[0]
            table = own if self.class_row == "own" else self.pos_embed[:, count:]
            self.pos_embed = nn.Parameter(table.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        self.class_token = self.cls_token = self.cls_token_tail = None
        self.global_pool = "avg" if self.global_pool == "token" else self.global_pool
        for block in self.blocks:
            block.mixer.class_token = None
        if self.rope is not None:
            self.rope.skip = 0

    def as_backbone(self, out_indices: Sequence[int] | None = None, **options: Any) -> VimBackbone:
        """The published backbone on this trunk; by default of four blocks at equal distances."""
        return VimBackbone(self, out_indices or quarters(len(self.blocks)), **options)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log is decayed."""
        tables = {"pos_embed", "cls_token", "cls_token_tail"} & {name for name, _ in self.named_parameters()}
        return {*tables, *ssm_parameters(self, "D", "dt_bias")}


@torch.fx.wrap
def check_size(shape: Sequence[int], img_size: tuple[int, int]) -> None:
    """Refuse images of another size than the model's."""
    height, width = shape[-2:]
    if (height, width) != img_size:
        raise ValueError(
            f"Vim: images must be {img_size[0]} x {img_size[1]}, got {height} x {width}; create the model with "
            f"img_size=({height}, {width}) or dynamic_img_size=True, or call set_input_size"
        )


def _check_options(
    global_pool: str, class_token: str | None, rope: str | None = None, dynamic_img_size: bool = False
) -> None:
    check_choice("Vim", "class_token", class_token, CLASS_TOKENS)
    check_choice("Vim", "global_pool", global_pool, POOLS)
    check_choice("Vim", "rope", rope, ("stream", "block", None))
    if global_pool == "token" and class_token is None:
        raise ValueError("Vim: global_pool='token' needs a class token; pass global_pool='avg' or class_token='middle'")
    if rope and class_token == "ends":
        raise ValueError("Vim: rope turns patches behind at most one class token, got class_token='ends'")
    if rope and dynamic_img_size:
        raise ValueError("Vim: rope has a table of one size; drop dynamic_img_size and call set_input_size")


def keys(directions: str = "v2") -> list[Rule]:
    """Key rules; ``directions`` is the published bimamba_type: "v2", "v1" (two decays, else shared) or "none"."""

    def joined(ours: str, *published: str) -> Rule:
        return stack(published if directions == "v2" else published[:1], ours)

    return [
        stack(("A_log",) if directions == "none" else ("A_log", "A_b_log"), "ssm.A_log"),
        joined("ssm.D", "D", "D_b"),
        joined("ssm.x_proj", "x_proj.weight", "x_proj_b.weight"),
        joined("ssm.dt_weight", "dt_proj.weight", "dt_proj_b.weight"),
        joined("ssm.dt_bias", "dt_proj.bias", "dt_proj_b.bias"),
        joined("sequence_conv.weight", "conv1d.weight", "conv1d_b.weight"),
        joined("sequence_conv.bias", "conv1d.bias", "conv1d_b.bias"),
        reshape(r"\.sequence_conv\.weight$", "k d 1 w -> k d w"),
        rename(r"^layers\.(\d+)\.", r"blocks.\1."),
        rename(r"\.mixer\.gamma$", r".layer_scale.gamma"),
        rename(r"^norm_f\.", r"norm."),
        drop(r"^rope\.freqs_(cos|sin)$"),
    ]


KEYS = keys()


def _weights(size: str, file: str, top1: float, top5: float, notes: str = "") -> dict[str, Weights]:
    hub = f"{REPOSITORY}-{size}-midclstok"
    return {
        "in1k": Weights(
            "apache-2.0", f"https://github.com/{REPOSITORY}", "arXiv:2401.09417",
            hf_hub_id=hub, hf_hub_filename=file, top1=top1, top5=top5, notes=notes,
        )
    }  # fmt: skip


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(name, Vim, kwargs, KEYS, weights or {}, fixed_input_size=True, description=description)


EMA = "81.9 may be that of the EMA weights, entry model_ema"
VARIANTS = [
    _variant("vim_tiny", _weights("tiny", "vim_t_midclstok_76p1acc.pth", 76.1, 93.0), embed_dim=192),
    _variant("vim_small", _weights("small", "vim_s_midclstok_80p5acc.pth", 80.5, 95.1),
             embed_dim=384, drop_path_rate=0.05),
    _variant("vim_base", _weights("base", "vim_b_midclstok_81p9acc.pth", 81.9, 95.8, EMA), embed_dim=768),
    _variant("vim_tiny_stride8", _weights("tiny", "vim_t_midclstok_ft_78p3acc.pth", 78.3, 94.2),
             "published as Vim-tiny+", embed_dim=192, stride=8),
    _variant("vim_small_stride8", _weights("small", "vim_s_midclstok_ft_81p6acc.pth", 81.6, 95.4),
             "published as Vim-small+", embed_dim=384, stride=8),
    _variant("vim_nano", None, "not published: small images, demos",
             img_size=32, patch_size=4, embed_dim=96, depth=8),
    _variant("test_vim", None, "for tests", img_size=32, patch_size=8, embed_dim=16, depth=3),
]  # fmt: skip

# Published arguments with the values they have where they are not given, as far as the sheet says.
DEFAULTS = {
    "img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "embed_dim": 192, "d_state": 16, "channels": 3,
    "num_classes": 1000, "rms_norm": True, "norm_epsilon": EPS, "final_pool_type": "none", "if_abs_pos_embed": True,
    "if_rope": False, "if_rope_residual": False, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True,
    "use_middle_cls_token": True, "use_double_cls_token": False, "init_layer_scale": None,
}  # fmt: skip
UNCHANGED = {
    "ssm_cfg": None, "if_bidirectional": False, "flip_img_sequences_ratio": -1.0, "pt_hw_seq_len": ROTARY_GRID,
}  # fmt: skip
ELSEWHERE = {  # change no output: training, precision, fused or not
    "drop_rate", "drop_path_rate", "fused_add_norm", "residual_in_fp32", "pretrained", "ft_seq_len", "use_checkpoint",
    "initializer_cfg", "device", "dtype",
}  # fmt: skip
FACTORIES = {f"vim_{size}_": {"embed_dim": dim} for size, dim in (("tiny", 192), ("small", 384), ("base", 768))}
FINAL_POOLS = {"none": "last", "mean": "avg", "max": "logit_max", "all": ""}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "v2": {"scan": "bidirectional"},
    "v1": {"scan": "bidirectional", "shared": True, "merge": "sum"},
    "none": {"scan": "raster", "merge": "sum"},
}


def directions_of(kwargs: Mapping[str, Any]) -> str:
    """The published ``bimamba_type`` that a mixer has; ``if_bimamba``, an older name, chooses "v1"."""
    return "v1" if kwargs.get("if_bimamba") else kwargs.get("bimamba_type", "v2")


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Vim`` for those of the published ``VisionMamba``."""
    given = {"if_divide_out" if key == "if_devide_out" else key: value for key, value in kwargs.items()}
    given["bimamba_type"] = directions_of(kwargs)
    given.pop("if_bimamba", None)
    for key, value in UNCHANGED.items():
        if given.pop(key, value) not in (value, None, 0, {}):
            raise NotCovered(f"{key}={kwargs[key]!r}")
    nothing_left(given.keys() - DEFAULTS.keys() - ELSEWHERE)
    given = DEFAULTS | given
    if given["bimamba_type"] not in DIRECTIONS or given["final_pool_type"] not in FINAL_POOLS:
        raise NotCovered(f"bimamba_type={given['bimamba_type']!r}, final_pool_type={given['final_pool_type']!r}")
    if given["norm_epsilon"] != EPS:
        raise NotCovered(f"norm_epsilon={given['norm_epsilon']}")
    if given["if_rope"] and given["if_cls_token"] and given["use_double_cls_token"]:
        raise NotCovered("if_rope with two class tokens fails in the published code")
    where = "ends" if given["use_double_cls_token"] else "middle" if given["use_middle_cls_token"] else "first"
    where = where if given["if_cls_token"] else None
    if where and given["final_pool_type"] == "max":
        raise NotCovered("final_pool_type='max' with a class token is the largest logit of the published code")
    same = ("img_size", "num_classes", "patch_size", "stride", "embed_dim", "depth", "d_state")
    return {
        **{key: given[key] for key in same},
        "in_chans": given["channels"],
        "global_pool": "token" if where else FINAL_POOLS[given["final_pool_type"]],
        "merge": "mean" if given["if_divide_out"] else "sum",
        "class_token": where,
        "pos_embed": given["if_abs_pos_embed"],
        "rope": ("stream" if given["if_rope_residual"] else "block") if given["if_rope"] else None,
        "norm": "rms" if given["rms_norm"] else "layer",
        "layer_scale": given["init_layer_scale"],
        **DIRECTIONS[given["bimamba_type"]],
    }


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """A factory or ``VisionMamba`` of the published classification code, ``VisionMambaSeg`` or ``VisionMambaDet``."""
    name = entry.partition(":")[2]
    if name == "VisionMambaSeg":
        return _published_backbone(kwargs)
    if name == "VisionMambaDet":
        return _published_detector(kwargs)
    factory = next((start for start in FACTORIES if name.startswith(start)), None)
    if name != "VisionMamba" and factory is None:
        raise NotCovered(f"entry {entry!r} is no model of this family")
    implied = {**FACTORIES[factory], "stride": 8 if "_stride8_" in name else 16} if factory else {}
    ours = translate({**implied, **kwargs})
    rules = keys(directions_of(kwargs))
    if ours["class_token"] == "ends":
        rules = [*rules, rename(r"^cls_token_head$", "cls_token")]
    return Published(Vim(**ours), rules, run_blocks)


def _published_backbone(kwargs: Mapping[str, Any]) -> Published:
    given = dict(kwargs)
    own = {
        key: given.pop(key) for key in ("out_indices", "use_residual_as_feature", "last_layer_process") if key in given
    }
    if not given.pop("if_fpn", True):
        raise NotCovered("if_fpn=False")
    # As published: this class passes its arguments on by position, one place off.
    shifted = {"d_state": given.pop("in_chans", 16), "channels": given.pop("num_classes", 3)}
    given |= {**shifted, "final_pool_type": "mean"}
    features = "stream" if own.get("use_residual_as_feature", False) else "branch"
    last = {"none": "branch", "add": "stream", "add & norm": "norm"}[own.get("last_layer_process", "none")]
    model = VimBackbone(Vim(**translate(given)), sorted(own.get("out_indices", (3, 5, 7, 11))), features, last)
    # As published: the size of the patches chooses the pyramid, not their stride.
    model.pyramid = nn.ModuleList(pyramid(model.trunk.embed_dim, given.get("patch_size", 16)))
    rules = [
        *keys(directions_of(kwargs)),
        *([] if isinstance(model.trunk.norm, RmsNorm | LayerNorm) else [drop(r"^norm\.")]),
        *(rename(rf"^fpn{i + 1}\.", f"pyramid.{i}.") for i in range(4)),
        rename(r"^(blocks|pos_embed|patch_embed|norm)", r"trunk.\1"),
    ]
    return Published(model, rules, run_features)


def _published_detector(kwargs: Mapping[str, Any]) -> Published:
    given = {key: value for key, value in kwargs.items() if key != "if_fpn"}
    process, name = given.pop("last_layer_process", "none"), given.pop("out_feature", "last_feat")
    if process not in ("none", "add"):
        raise NotCovered(f"last_layer_process={process!r} fails in the published code, which has no norm there")
    given |= {"channels": given.pop("in_chans", 3), "num_classes": 0, "final_pool_type": "mean"}
    model = Vim(**translate(given))
    model.remove_class_token()
    model.norm = nn.Identity()

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, grid = model.embed(inputs["x"])
        for block in model.blocks:
            _, branch, x = block.step(x, grid)
        return {name: to_map(branch if process == "none" else x, grid)}

    return Published(model, keys(directions_of(kwargs)), run)
