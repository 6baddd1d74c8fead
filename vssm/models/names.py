"""Key rules of the published code of VMamba and of MLLA, for the families that grew out of them."""

from __future__ import annotations

from vssm.models.keys import Rule, also, drop, rename, reshape

FIRST_RELEASE: list[Rule] = [  # names of the first release, which some files have kept
    also(rename(r"^patch_embed\.proj\.", r"patch_embed.0.")),
    also(rename(r"^patch_embed\.norm\.", r"patch_embed.2.")),
    also(rename(r"\.ln_1\.", r".norm.")),
    also(rename(r"\.self_attention\.", r".op.")),
    also(rename(r"^norm\.", r"classifier.norm.")),
    also(rename(r"^head\.", r"classifier.head.")),
]

SSM_SHAPES: list[Rule] = [  # an axis for the k directions
    reshape(r"\.A_logs$", "(k d) n -> k d n"),
    reshape(r"\.Ds$", "(k d) -> k d"),
]

MIXER: list[Rule] = [
    rename(r"\.mixer\.conv2d\.", r".mixer.conv."),
    rename(r"\.mixer\.x_proj_weight$", r".mixer.ssm.x_proj"),
    rename(r"\.mixer\.dt_projs_weight$", r".mixer.ssm.dt_weight"),
    rename(r"\.mixer\.dt_projs_bias$", r".mixer.ssm.dt_bias"),
    rename(r"\.mixer\.A_logs$", r".mixer.ssm.A_log"),
    rename(r"\.mixer\.Ds$", r".mixer.ssm.D"),
]


def frame(stages: int = 4) -> list[Rule]:
    """Stem, stages, mixers and head of a ``Hierarchical``, and the norms of its ``StageMaps``."""
    return [
        rename(r"^patch_embed\.0\.", r"stem.conv1."),
        rename(r"^patch_embed\.2\.", r"stem.norm1."),
        rename(r"^patch_embed\.5\.", r"stem.conv2."),
        rename(r"^patch_embed\.7\.", r"stem.norm2."),
        *(rename(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(stages - 1)),
        rename(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        rename(r"\.op\.", r".mixer."),
        *MIXER,
        rename(r"^classifier\.norm\.", r"norm."),
        rename(r"^classifier\.head\.", r"head.fc."),
        rename(r"^outnorm(\d+)\.", r"out_norms.\1."),
    ]


def unread(kept: int, stages: int) -> list[Rule]:
    """For a backbone that ends with the first ``kept`` of ``stages``: the published one holds the others, unread."""
    return [*(drop(rf"^layers\.{i}\.") for i in range(kept, stages)), drop(rf"^layers\.{kept - 1}\.downsample\.")]


MLLA: list[Rule] = [  # stem, downsampling, blocks and head
    rename(r"\.cpe(\d)\.", r".position\1."),
    rename(r"^patch_embed\.", r"stem."),
    rename(r"\.downsample\.conv\.0\.", r".downsample.widen."),
    rename(r"\.downsample\.conv\.1\.", r".downsample.shrink."),
    rename(r"\.downsample\.conv\.2\.", r".downsample.narrow."),
    *(rename(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    rename(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    rename(r"^head\.", r"head.fc."),
    rename(r"^outnorm(\d+)\.", r"out_norms.\1."),
]
