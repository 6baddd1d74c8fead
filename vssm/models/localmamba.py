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
from vssm.layers.local_mixer import Directions, local_mixers
from vssm.layers.norm import ChannelNorm
from vssm.layers.ssm import ssm_parameters
from vssm.layers.stem import PatchStem
from vssm.models.backbone import StageMaps, run_blocks, run_classifier, run_features
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, drop, rename, reshape, stack
from vssm.models.localvim import EPS, SEARCHED, LocalVim, LocalVimBackbone
from vssm.models.names import SSM_SHAPES, frame
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
        directions: Directions = SEARCHED_TINY,
        scan: str = "local",
        scan_options: Mapping[str, Any] | None = None,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = widths("LocalVMamba", dim, depths)
        make_mixer = local_mixers(scan, scan_options, directions, sum(depths), "grid")

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


def _each(ours: str, published: str) -> Rule:
    """The four directions' own parameters in one; ``published`` has a place for their number."""
    return stack([published.format(k) for k in range(4)], ours)


ATTENTION = [
    rename(r"\.attention\.global_reduce\.", r".attention.reduce."),
    rename(r"\.attention\.channel_select\.", r".attention.expand."),
]
KEYS: list[Rule] = [  # of LocalVim
    drop(r"^rope\.freqs_(cos|sin)$"),
    _each("ssm.A_log", "A_log_{}"),
    _each("ssm.D", "D_{}"),
    _each("ssm.x_proj", "x_proj_{}.weight"),
    _each("ssm.dt_weight", "dt_proj_{}.weight"),
    _each("ssm.dt_bias", "dt_proj_{}.bias"),
    _each("sequence_conv.weight", "conv1d_{}.weight"),
    _each("sequence_conv.bias", "conv1d_{}.bias"),
    reshape(r"\.sequence_conv\.weight$", "k d 1 w -> k d w"),
    rename(r"\.mixer\.attn\.", r".mixer.attention."),
    *ATTENTION,
    rename(r"^layers\.(\d+)\.", r"blocks.\1."),
    rename(r"^norm_f\.", r"norm."),
]
BACKBONE_KEYS: list[Rule] = [
    *KEYS,
    rename(r"^outnorm_(\d+)\.", r"out_norms.\1."),
    rename(r"^(pos_embed|patch_embed|blocks)", r"trunk.\1"),
]
VMAMBA_KEYS: list[Rule] = [  # of LocalVMamba and its backbone
    *SSM_SHAPES,
    *frame(),
    rename(r"\.mixer\.multi_scan\.attn\.", r".mixer.attention."),
    *ATTENTION,
]


def _weights(file: str, top1: float, notes: str = "") -> dict[str, Weights]:
    origin = f"https://github.com/{REPOSITORY}"
    url = f"{origin}/releases/download/v1.0.0/{file}.ckpt"
    return {"in1k": Weights("apache-2.0", origin, "arXiv:2403.09338", url=url, top1=top1, notes=notes)}


def _vim(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    fixed = kwargs.get("class_token") is not None
    return Variant(name, LocalVim, kwargs, KEYS, weights or {}, fixed_input_size=fixed, description=description)


def _vmamba(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, LocalVMamba, kwargs, VMAMBA_KEYS, weights or {}, first_conv="stem.conv1", classifier="head.fc",
        pool_size=(7, 7), description=description,
    )  # fmt: skip


RETRAINED = "82.7 is that of the paper; the repository marks this model as being trained again"
VARIANTS = [
    _vim("localvim_tiny", _weights("local_vim_tiny", 76.2), drop_path_rate=0.1),
    _vim("localvim_tiny_cls", _weights("local_vim_tiny_middle_cls_token", 77.8), "with a class token",
         class_token="middle", rope=False, global_pool="token", drop_path_rate=0.1),
    _vim("localvim_tiny_fixed", None, "published without weights; directions that no search chose",
         directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small", None, "as the repository builds it, with directions that no search chose; published with "
         "top-1 81.1, by a link to the weights of another model", embed_dim=384, directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small_searched", None, "with searched directions, as the published downstream recipes build it; its "
         "weights fit localvim_small, too, and compute something else there", embed_dim=384, drop_path_rate=0.1),
    _vmamba("localvmamba_tiny", _weights("local_vssm_tiny", 82.7, RETRAINED), drop_path_rate=0.2),
    _vmamba("localvmamba_small", _weights("local_vssm_small", 83.7),
            depths=(2, 2, 27, 2), directions=SEARCHED_SMALL, drop_path_rate=0.2),
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
}  # fmt: skip
VIM_FACTORY = {
    "patch_size": 16, "embed_dim": 192, "depth": 20, "rms_norm": True, "final_pool_type": "mean", "if_rope": True,
    "if_rope_residual": True, "if_abs_pos_embed": True, "directions": [names.split() for names in SEARCHED],
}  # fmt: skip
VIM_DEFAULTS = {  # of the published class, where it is not given; None must be given
    "img_size": 224, "patch_size": 16, "depth": 24, "embed_dim": 192, "channels": 3, "num_classes": 1000,
    "rms_norm": None, "final_pool_type": None, "if_abs_pos_embed": None, "if_rope": False, "if_rope_residual": False,
    "if_cls_token": False, "use_middle_cls_token": False, "directions": None,
}  # fmt: skip
VIM_UNCHANGED = {"d_state": 16, "ssm_cfg": None, "bimamba_type": "v2", "norm_epsilon": EPS, "stride": 16}
ELSEWHERE = {  # change no output: training, precision, fused or not
    "drop_rate", "drop_path_rate", "fused_add_norm", "residual_in_fp32", "pretrained", "pretrained_ckpt",
    "use_checkpoint",
}  # fmt: skip


def translate_vim(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVim`` for those of the published ``VisionMamba``."""
    given = {key: value for key, value in kwargs.items() if key not in ELSEWHERE}
    for key, value in VIM_UNCHANGED.items():
        if given.pop(key, value) not in (value, None):
            raise NotCovered(f"{key}={kwargs[key]!r}")
    nothing_left(given.keys() - VIM_DEFAULTS.keys())
    given = VIM_DEFAULTS | given
    needed = {"if_abs_pos_embed": True, "if_rope_residual": given["if_rope"]}
    if given["if_cls_token"]:
        needed |= {"use_middle_cls_token": True, "if_rope": False}
    else:
        needed |= {"final_pool_type": "mean"}
    for key, value in needed.items():
        if given[key] != value:
            raise NotCovered(f"{key}={given[key]!r}")
    if given["directions"] is None:
        raise NotCovered("directions=None is the network that directions are searched with")
    same = ("img_size", "num_classes", "patch_size", "embed_dim", "depth")
    return {
        **{key: given[key] for key in same},
        "in_chans": given["channels"],
        "directions": [" ".join(names) for names in given["directions"]],
        "class_token": "middle" if given["if_cls_token"] else None,
        "global_pool": "token" if given["if_cls_token"] else "avg",
        "rope": given["if_rope"],
        "norm": "rms" if given["rms_norm"] else "layer",
    }


VMAMBA_SAME = {"patch_size": "patch_size", "in_chans": "in_chans", "num_classes": "num_classes", "depths": "depths",
               "dims": "dim"}  # fmt: skip
VMAMBA_UNCHANGED = {
    "ssm_d_state": 16, "ssm_dt_rank": "auto", "ssm_ratio": 2.0, "mlp_ratio": 0.0, "patch_norm": True, "d_state": 16,
}  # fmt: skip


def translate_vmamba(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVMamba`` for those of the published ``VSSM``."""
    given = dict(kwargs)
    directions = given.pop("directions", None)
    if directions is None:
        raise NotCovered("directions=None is the network that directions are searched with")
    ours = translated(given, VMAMBA_SAME, VMAMBA_UNCHANGED, ELSEWHERE)
    return {**ours, "directions": [" ".join(names) for names in directions]}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """A factory, a class or a backbone of the published code as our model."""
    name = entry.partition(":")[2].split(" ")[0]
    given = dict(kwargs)
    out_indices = given.pop("out_indices", None)
    if name in VIM_FACTORIES:
        model = LocalVim(**translate_vim({**VIM_FACTORY, **VIM_FACTORIES[name], **kwargs}))
        return Published(model, KEYS, run_blocks)
    if name == "VisionMamba":
        return Published(LocalVim(**translate_vim(kwargs)), KEYS, run_blocks)
    if name == "Backbone_LocalVisionMamba":
        trunk = LocalVim(**{**translate_vim(given), "num_classes": 0})
        return Published(LocalVimBackbone(trunk, out_indices or (4, 9, 14, 19)), BACKBONE_KEYS, run_features)
    if name in ("local_vssm_tiny", "local_vssm_small"):
        # As published: these factories take arguments and leave them out.
        row = next(v for v in VARIANTS if v.name == name.replace("local_vssm", "localvmamba"))
        return Published(row.build(), VMAMBA_KEYS, _run_vmamba)
    if name == "VSSM":
        return Published(LocalVMamba(**translate_vmamba(kwargs)), VMAMBA_KEYS, _run_vmamba)
    if name == "Backbone_LocalVSSM":
        model = StageMaps(LocalVMamba(**{**translate_vmamba(given), "num_classes": 0}), out_indices or (0, 1, 2, 3))
        return Published(model, VMAMBA_KEYS, run_features)
    raise NotCovered(f"entry {entry!r} is no model of this family")


def _run_vmamba(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    stem = model.stem(inputs["x"])
    out = {"patch_embed": stem, "stage0.block0": model.stages[0].blocks[0](stem)} | run_classifier(model, inputs)
    return {name: x if name == "logits" else x.movedim(1, -1) for name, x in out.items()}
