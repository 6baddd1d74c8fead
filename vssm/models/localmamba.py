"""LocalMamba: Visual State Space Model with Windowed Selective Scan (Huang et al., 2024, arXiv:2403.09338).

Every block reads its grid in four of eight directions: rows, columns, windows of side 2 and of side 7, each also
backwards. Which four, a search chose for each block; the outputs pass one channel attention and are added up.
``LocalVim`` is an isotropic host like Vim, ``LocalVMamba`` a hierarchical one like the first VMamba.
Published code and weights: github.com/hunto/LocalMamba (Apache-2.0, both). Same functions; other key names, see KEYS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from vssm.layers.downsample import PatchMerging
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.local_mixer import ALL, Directions, local_mixers
from vssm.layers.norm import ChannelNorm
from vssm.layers.ssm import ssm_parameters
from vssm.layers.stem import PatchStem
from vssm.models.backbone import StageMaps, run_blocks, run_classifier, run_features
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, drop, rename, reshape, stack
from vssm.models.localvim import EPS, SEARCHED, LocalVim, LocalVimBackbone
from vssm.models.names import SSM_SHAPES, frame, unread
from vssm.models.variant import NotCovered, Published, Variant, Weights, nothing_left, translated

REPOSITORY = "hunto/LocalMamba"
FIXED = "h h_flip w2 w2_flip"
SEARCHED_TINY = (
    "h h_flip w7 w7_flip", "h_flip v_flip w2 w2_flip", "h_flip v_flip w2_flip w7", "h_flip v v_flip w2",
    "h h_flip v_flip w2_flip", "h_flip v_flip w2 w2_flip", "h w2_flip w7 w7_flip", "h h_flip v v_flip",
    "h v_flip w7 w7_flip", "h_flip v w2 w7_flip", "v v_flip w2 w7_flip", "h h_flip v_flip w2_flip",
    "v_flip w2_flip w7 w7_flip", "h_flip v_flip w2_flip w7_flip", "h_flip v w7 w7_flip",
)  # fmt: skip
SEARCHED_SMALL = (
    "h v v_flip w7_flip", "h h_flip v w7", "h_flip v v_flip w7", "h_flip v w2_flip w7", "h_flip v w2_flip w7",
    "h_flip v_flip w2 w7_flip", "h_flip v v_flip w7", "h v v_flip w7", "h v v_flip w7", "h v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w2", "v v_flip w2_flip w7", "h h_flip v w2", "h_flip v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w7_flip", "h v v_flip w7_flip", "h h_flip v_flip w7", "h_flip v_flip w2_flip w7",
    "h_flip v v_flip w7_flip", "v v_flip w7 w7_flip", "h v v_flip w7_flip", "h_flip v v_flip w2", "h v v_flip w2_flip",
    "h h_flip v w7", "h h_flip w7 w7_flip", "h v_flip w2 w2_flip", "h v_flip w2 w7", "h v v_flip w7_flip",
    "h_flip v w2_flip w7", "h_flip v_flip w7 w7_flip", "h v w7 w7_flip",
)  # fmt: skip


class LocalVMambaBlock(nn.Module):
    """Norm, mix, add. (B, C, H, W) in and out, channels last in memory."""

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.norm, self.mixer = ChannelNorm(dim, EPS, narrow=True), mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        return x + self.drop_path(to_map(self.mixer(to_tokens(self.norm(x)), grid), grid))


class LocalVMamba(Hierarchical):
    """LocalVMamba classifier for images of any size from one patch. The defaults are ``localvmamba_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        d_state, expand, dt_rank, conv_size, conv_bias, act: Of the mixers, see ``ScanMixer``; ``conv_size=0`` for no
            convolution.
        directions, scan, scan_options: As in ``LocalVim``; blocks count through all stages.
        patch_size: Pixels of the image to one cell of the first stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int | Sequence[int] = 96,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_size: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
        directions: Directions = SEARCHED_TINY,
        scan: str = "local",
        scan_options: Mapping[str, Any] | None = None,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = widths("LocalVMamba", dim, depths)
        make_mixer = local_mixers(
            scan, scan_options, directions, sum(depths), "grid", d_state=d_state, expand=expand, dt_rank=dt_rank,
            conv_size=conv_size, conv_bias=conv_bias, act=act,
        )  # fmt: skip

        def block(i: int, j: int, rate: float) -> nn.Module:
            return LocalVMambaBlock(make_mixer(sum(depths[:i]) + j, dims[i]), dims[i], rate)

        stages = make_stages(depths, dims, drop_path_rate, block, PatchMerging)
        super().__init__(
            PatchStem(in_chans, dims[0], patch_size), stages, dims, ChannelNorm(dims[-1], EPS),
            reduction=patch_size, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the step-size bias are decayed."""
        return set(ssm_parameters(self, "D"))


SEARCH = [  # where directions are searched for
    rename(r"\.multi_scan\.weights$", r".weights"),
    reshape(r"\.weights$", "k 1 1 1 -> k"),
]
ATTENTION = [
    rename(r"\.attention\.global_reduce\.", r".attention.reduce."),
    rename(r"\.attention\.channel_select\.", r".attention.expand."),
]
OWN = {  # of each direction: our entry of all of them, and the published ones with a place for its number
    "ssm.A_log": "A_log_{}", "ssm.D": "D_{}", "ssm.x_proj": "x_proj_{}.weight", "ssm.dt_weight": "dt_proj_{}.weight",
    "ssm.dt_bias": "dt_proj_{}.bias", "sequence_conv.weight": "conv1d_{}.weight",
    "sequence_conv.bias": "conv1d_{}.bias",
}  # fmt: skip


def vim_keys(directions: Directions = FIXED) -> list[Rule]:
    """Key rules of LocalVim whose blocks read ``directions``."""
    choices = [ALL] if directions is None else [directions] if isinstance(directions, str) else directions
    counts = sorted({len(choice.split()) for choice in choices}, reverse=True)  # the most first: they hold the others
    return [
        drop(r"^rope\.freqs_(cos|sin)$"),
        *(stack([name.format(k) for k in range(n)], ours) for n in counts for ours, name in OWN.items()),
        reshape(r"\.sequence_conv\.weight$", "k d 1 w -> k d w"),
        *SEARCH,
        rename(r"\.mixer\.attn\.", r".mixer.attention."),
        *ATTENTION,
        rename(r"^layers\.(\d+)\.", r"blocks.\1."),
        rename(r"^norm_f\.", r"norm."),
    ]


KEYS = vim_keys()
BACKBONE_KEYS: list[Rule] = [  # behind those of the classifier
    rename(r"^outnorm_(\d+)\.", r"out_norms.\1."),
    rename(r"^(pos_embed|patch_embed|blocks)", r"trunk.\1"),
]
VMAMBA_KEYS: list[Rule] = [  # of LocalVMamba and its backbone
    *SSM_SHAPES,
    *frame(),
    rename(r"\.mixer\.multi_scan\.attn\.", r".mixer.attention."),
    *ATTENTION,
    *SEARCH,
]


def _weights(file: str, top1: float, notes: str = "") -> dict[str, Weights]:
    origin = f"https://github.com/{REPOSITORY}"
    url = f"{origin}/releases/download/v1.0.0/{file}.ckpt"
    return {"in1k": Weights("apache-2.0", origin, "arXiv:2403.09338", url=url, top1=top1, notes=notes)}


def _vim(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    fixed, rules = kwargs.get("class_token") is not None, vim_keys(kwargs.get("directions", SEARCHED))
    return Variant(name, LocalVim, kwargs, rules, weights or {}, fixed_input_size=fixed, description=description)


def _vmamba(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, LocalVMamba, kwargs, VMAMBA_KEYS, weights or {}, first_conv="stem.conv1", classifier="head.fc",
        pool_size=(7, 7), description=description,
    )  # fmt: skip


RETRAINED = "82.7 is that of the paper; the repository marks this model as being trained again"
VARIANTS = [
    _vim("localvim_tiny", _weights("local_vim_tiny", 76.2), drop_path_rate=0.1),
    _vim("localvim_tiny_cls", _weights("local_vim_tiny_middle_cls_token", 77.8), "with a class token",
         class_token="middle", rope=None, global_pool="token", drop_path_rate=0.1),
    _vim("localvim_tiny_fixed", None, "published without weights; directions that no search chose",
         directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small", None, "as the repository builds it, with directions that no search chose; published with "
         "top-1 81.1, by a link to the weights of another model", embed_dim=384, directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small_searched", None, "with searched directions, as the published downstream recipes build it; its "
         "weights fit localvim_small, too, and compute something else there", embed_dim=384, drop_path_rate=0.1),
    _vmamba("localvmamba_tiny", _weights("local_vssm_tiny", 82.7, RETRAINED), drop_path_rate=0.2),
    _vmamba("localvmamba_small", _weights("local_vssm_small", 83.7),
            depths=(2, 2, 27, 2), directions=SEARCHED_SMALL, drop_path_rate=0.2),
    _vim("localvim_tiny_search", None, "to search for directions with", embed_dim=128, directions=None,
         drop_path_rate=0.1),
    _vmamba("localvmamba_tiny_search", None, "to search for directions with", dim=32, directions=None,
            drop_path_rate=0.1),
    _vmamba("localvmamba_small_search", None, "to search for directions with",
            depths=(2, 2, 27, 2), dim=32, directions=None, drop_path_rate=0.1),
    _vim("test_localvim", None, "for tests", img_size=32, patch_size=8, embed_dim=16, depth=3,
         directions=("h v_flip w3 w3_flip", "h_flip v w2_flip w3", FIXED)),
    _vmamba("test_localvmamba", None, "for tests", depths=(1, 1, 1, 1), dim=8,
            directions=("h v_flip w3 w3_flip", "h_flip v w2_flip w3", FIXED, FIXED)),
]  # fmt: skip

VIM_FACTORIES: dict[str, dict[str, Any]] = {  # published constructors, by what sets them apart
    "local_vim_tiny": {},
    "local_vim_tiny_wo_search": {"directions": [FIXED.split()] * 20},
    "local_vim_tiny_middle_cls_token": {
        "if_cls_token": True, "use_middle_cls_token": True, "if_rope": False, "if_rope_residual": False,
    },
    "local_vim_small": {"embed_dim": 384, "directions": [FIXED.split()] * 20},
    "local_vim_tiny_search": {"embed_dim": 128, "directions": None},
}  # fmt: skip
VIM_FACTORY = {
    "patch_size": 16, "embed_dim": 192, "depth": 20, "rms_norm": True, "final_pool_type": "mean", "if_rope": True,
    "if_rope_residual": True, "if_abs_pos_embed": True, "directions": [names.split() for names in SEARCHED],
}  # fmt: skip
VIM_DEFAULTS: dict[str, Any] = {  # of the published class
    "img_size": 224, "patch_size": 16, "depth": 24, "embed_dim": 192, "channels": 3, "num_classes": 1000,
    "rms_norm": False, "final_pool_type": "none", "if_abs_pos_embed": False, "if_rope": False,
    "if_rope_residual": False, "if_cls_token": False, "use_middle_cls_token": False, "directions": None,
}  # fmt: skip
VIM_UNCHANGED = {"ssm_cfg": None, "norm_epsilon": EPS, "pt_hw_seq_len": 14}
ELSEWHERE = {  # change no output: training, precision, fused or not; or, as published, nothing reads them
    "drop_rate", "drop_path_rate", "fused_add_norm", "residual_in_fp32", "pretrained", "pretrained_ckpt",
    "use_checkpoint", "d_state", "stride", "bimamba_type", "if_bimamba", "if_devide_out", "if_divide_out",
    "ft_seq_len", "initializer_cfg", "device", "dtype",
}  # fmt: skip
VIM_POOLS = {"mean": "avg", "none": "last", "all": ""}


def translate_vim(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVim`` for those of the published ``VisionMamba``."""
    given = {key: value for key, value in kwargs.items() if key not in ELSEWHERE}
    for key, value in VIM_UNCHANGED.items():
        if given.pop(key, value) not in (value, None, {}):
            raise NotCovered(f"{key}={kwargs[key]!r}")
    nothing_left(given.keys() - VIM_DEFAULTS.keys())
    given = VIM_DEFAULTS | given
    needed = {"if_abs_pos_embed": True}
    if given["if_cls_token"]:
        needed |= {"use_middle_cls_token": True, "if_rope": False}
    elif given["final_pool_type"] not in VIM_POOLS:
        raise NotCovered(f"final_pool_type={given['final_pool_type']!r}")
    for key, value in needed.items():
        if given[key] != value:
            raise NotCovered(f"{key}={given[key]!r}")
    same = ("img_size", "num_classes", "patch_size", "embed_dim", "depth")
    return {
        **{key: given[key] for key in same},
        "in_chans": given["channels"],
        "directions": _joined(given["directions"]),
        "class_token": "middle" if given["if_cls_token"] else None,
        "global_pool": "token" if given["if_cls_token"] else VIM_POOLS[given["final_pool_type"]],
        "rope": ("stream" if given["if_rope_residual"] else "block") if given["if_rope"] else None,
        "norm": "rms" if given["rms_norm"] else "layer",
    }


def _joined(directions: Sequence[Sequence[str]] | None) -> list[str] | None:
    """Published directions as ours."""
    return None if directions is None else [" ".join(names) for names in directions]


VMAMBA_FACTORIES = {row.name.replace("localvmamba", "local_vssm"): row for row in VARIANTS}
VMAMBA_SAME = {"patch_size": "patch_size", "in_chans": "in_chans", "num_classes": "num_classes", "depths": "depths",
               "dims": "dim", "ssm_d_state": "d_state", "ssm_ratio": "expand", "ssm_conv_bias": "conv_bias",
               "ssm_act_layer": "act"}  # fmt: skip
VMAMBA_UNCHANGED = {"patch_norm": True}
VMAMBA_ELSEWHERE = {  # the last three stand in published configurations, and nothing reads them
    *ELSEWHERE, "norm_layer", "ssm_drop_rate", "ssm_simple_init", "mlp_ratio", "downsample_version",
    "patchembed_version",
}  # fmt: skip


def translate_vmamba(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVMamba`` for those of the published ``VSSM``."""
    given = dict(kwargs)
    directions, rank, size = given.pop("directions", None), given.pop("ssm_dt_rank", "auto"), given.pop("ssm_conv", 3)
    return {
        **translated(given, VMAMBA_SAME, VMAMBA_UNCHANGED, VMAMBA_ELSEWHERE),
        "directions": _joined(directions),
        "dt_rank": None if rank == "auto" else rank,
        "conv_size": size if size > 1 else 0,
    }


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """A factory, a class or a backbone of the published code as our model."""
    name = entry.partition(":")[2].split(" ")[0]
    given = dict(kwargs)
    out_indices = given.pop("out_indices", None)
    if name in VIM_FACTORIES:
        given, name = {**VIM_FACTORY, **VIM_FACTORIES[name], **kwargs}, "VisionMamba"
    if name == "VisionMamba":
        ours = translate_vim(given)
        return Published(LocalVim(**ours), vim_keys(ours["directions"]), run_blocks)
    if name == "Backbone_LocalVisionMamba":
        ours = translate_vim(given)
        model = LocalVimBackbone(LocalVim(**{**ours, "num_classes": 0}), sorted(out_indices or (4, 9, 14, 19)))
        return Published(model, [*vim_keys(ours["directions"]), *BACKBONE_KEYS], run_features)
    if name in VMAMBA_FACTORIES:
        # As published: these factories take arguments and leave them out.
        return Published(VMAMBA_FACTORIES[name].build(), VMAMBA_KEYS, _run_vmamba)
    if name == "VSSM":
        return Published(LocalVMamba(**translate_vmamba(kwargs)), VMAMBA_KEYS, _run_vmamba)
    if name == "Backbone_LocalVSSM":
        model = LocalVMamba(**{**translate_vmamba(given), "num_classes": 0})
        maps = StageMaps(model, sorted(out_indices or (0, 1, 2, 3)))
        return Published(maps, [*unread(len(maps.stages), len(model.stages)), *VMAMBA_KEYS], run_features)
    raise NotCovered(f"entry {entry!r} is no model of this family")


def _run_vmamba(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    stem = model.stem(inputs["x"])
    out = {"patch_embed": stem, "stage0.block0": model.stages[0].blocks[0](stem)} | run_classifier(model, inputs)
    return {name: x if name == "logits" else x.movedim(1, -1) for name, x in out.items()}
