"""timm's API for backbones, written once for hierarchical and once for isotropic models.

A family gives the parts; ``timm.create_model``, ``features_only``, FX tracing and timm's optimizers then work as they
do with timm's own models. Maps are (B, C, H, W), tokens (B, L, C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from timm.layers import ClassifierHead, calculate_drop_path_rates, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vssm.kernels import causal_conv1d, selective_scan
from vssm.layers.position import resize_square, split_class_tokens
from vssm.scans import scan_table

# FX must not look into these; it finds them where a module's forward calls them by these names.
for leaf in (selective_scan, causal_conv1d, scan_table):
    register_notrace_function(leaf)

Indices = int | Sequence[int] | None


class Stage(nn.Module):
    """A downsampling, blocks at the new size, and a norm where a family has one there. (B, C, H, W) in and out."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return self.norm(checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x))


def widths(who: str, dim: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Channels of each stage: ``dim`` doubled with every stage, or as ``dim`` lists them.

    >>> widths("VMamba", 96, (2, 2, 8, 2))
    [96, 192, 384, 768]
    """
    dims = [dim * 2**i for i in range(len(depths))] if isinstance(dim, int) else list(dim)
    if len(dims) != len(depths):
        raise ValueError(f"{who}: dim must name one width a stage ({len(depths)} in depths), got {tuple(dims)}")
    return dims


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth of ``depth`` blocks, in a straight line from 0 to ``rate``, as timm's models have them.

    >>> drop_path_rates(0.5, 3)
    [0.0, 0.25, 0.5]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be from 0 to below 1, got {rate}")
    return calculate_drop_path_rates(rate, depth)


def make_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    drop_path_rate: float,
    block: Callable[[int, int, float], nn.Module],
    downsample: Callable[[int, int], nn.Module],
    norm: Callable[[int], nn.Module] | None = None,
) -> list[Stage]:
    """Stages of ``depths`` blocks of ``dims`` channels, whose drop path rates rise from 0 to ``drop_path_rate``.

    Args:
        depths, dims, drop_path_rate: As the models have them.
        block: Makes block j of stage i with a drop path rate, ``block(i, j, rate)``.
        downsample: Makes what stands before every stage but the first, ``downsample(dim, out)``.
        norm: Makes the norm that ends a stage, ``norm(dim)``.
    """
    rates, stages = iter(drop_path_rates(drop_path_rate, sum(depths))), []
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        shrink = downsample(dims[i - 1], dim) if i else nn.Identity()
        blocks = [block(i, j, rate) for j, rate in enumerate(islice(rates, depth))]
        stages.append(Stage(shrink, blocks, norm(dim) if norm else None))
    return stages


class Hierarchical(nn.Module):
    """A stem, stages that halve the map, a norm, pooling and a linear classifier.

    Args:
        stem: Image to the map of the first stage.
        stages: One ``Stage`` a resolution.
        dims: Channels of each stage.
        norm: After the last stage, before pooling.
        reduction: Pixels of the image to one cell of the first stage, each way; doubles with every stage.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``"avg"``, ``"max"``, … as in timm; ``""`` for none.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        norm: nn.Module,
        *,
        reduction: int = 4,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self._check_head(num_classes, global_pool)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, dims[-1], dims[-1]
        self.output_fmt = "NCHW"
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W): the last map, normalised."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of ``forward_features``; pooled features if ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that stages ``indices`` return (all if None, the last n if a number), as timm's models do.

        Args:
            x: Images.
            indices: Stages.
            norm: Normalise the last stage's map.
            stop_early: Run no stage behind the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: Leave out the final features.
        """
        _check_format(self, output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        x, maps = self.stem(x), []
        for i, stage in enumerate(stages):
            x = stage(x)
            final = i == len(self.feature_info) - 1
            if i in take:
                maps.append(self.norm(x) if norm and final else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if final else x), maps

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` with these ``indices`` does not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            if next(self.head.parameters(), None) is not None:  # of a head that is more than a classifier
                self.head = nn.Identity()
        return take

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0: remove it), and the pooling if ``global_pool`` is given."""
        if global_pool is not None:
            self._check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def _check_head(self, num_classes: int, global_pool: str) -> None:
        check_classes(num_classes)
        if num_classes and not global_pool:
            raise ValueError(
                f"{type(self).__name__}: global_pool='' leaves a map, which no classifier reads; pass num_classes=0 or "
                f"global_pool='avg', got num_classes={num_classes}"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs only and recompute the rest in backward; the output stays the same."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers, for learning rates that fall with depth."""
        stage = r"^stages\.(\d+)"
        last = (99999,)
        fine = [
            (stage + r"\.downsample", (0,)), (stage + r"\.blocks\.(\d+)", None), (stage + r"\.norm", last),
            (r"^norm", last),
        ]  # fmt: skip
        return {"stem": r"^stem", "blocks": stage if coarse else fine}


class Isotropic(nn.Module):
    """Blocks over a sequence of tokens that keeps its length, a norm, pooling and a linear classifier.

    A family sets ``blocks`` (a ModuleList of modules ``(tokens, grid) -> tokens``), ``norm``, ``head_drop``, ``head``,
    ``grid`` and ``pos_embed`` in its constructor, calls ``describe``, and says how images become tokens (``embed``) and
    how tokens are pooled (``pool``).
    """

    grid: tuple[int, int]  # of the patches of an image of the model's size
    pos_embed: nn.Parameter | None  # (1, L, C), class tokens included
    class_token: str | None = None  # where class tokens lie, see ``vssm.layers.position``
    class_row = "own"  # how the table is resized, see ``resize_tokens``
    blocks: nn.ModuleList
    norm: nn.Module
    head_drop: nn.Module
    head: nn.Module

    def describe(self, dim: int, reduction: int, num_classes: int, global_pool: str) -> None:
        """Set the attributes that timm reads."""
        self.num_classes, self.num_features, self.head_hidden_size, self.embed_dim = num_classes, dim, dim, dim
        self.global_pool = global_pool
        self.output_fmt = "NLC"
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(len(self.blocks))
        ]

    def embed(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """Images to tokens (B, L, C), class tokens included, and the grid of the patches."""
        raise NotImplementedError

    def patches(self, x: Tensor) -> Tensor:
        """Tokens without class tokens, in row-major order."""
        return split_class_tokens(x, self.class_token)[0]

    def class_tokens(self, x: Tensor) -> Tensor:
        """The class tokens alone, (B, n, C)."""
        return split_class_tokens(x, self.class_token)[1]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens to what the classifier sees."""
        raise NotImplementedError

    def run_block(self, i: int, x: Tensor, grid: Sequence[int]) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(self.blocks[i], x, grid)
        return self.blocks[i](x, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, L, C): all tokens after the last block, normalised."""
        x, grid = self.embed(x)
        for i in range(len(self.blocks)):
            x = self.run_block(i, x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of ``forward_features``; pooled features if ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The patches that blocks ``indices`` return (all if None, the last n if a number), as timm's models do.

        Args:
            x: Images.
            indices: Blocks.
            return_prefix_tokens: Pair each with its class tokens (B, n, C), wherever in the sequence they lie.
            norm: Normalise them.
            stop_early: Run no block behind the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NLC"``.
            intermediates_only: Leave out the final tokens.
        """
        _check_format(self, output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        found = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self.run_block(i, x, grid)
            if i in take:
                tokens = self.norm(x) if norm else x
                patches = self.patches(tokens)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, self.class_tokens(tokens)) if return_prefix_tokens else patches)
        if intermediates_only:
            return found
        return self.norm(x), found

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` with these ``indices`` does not need."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (0: remove it), and the pooling if ``global_pool`` is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        weight = self.norm.weight if hasattr(self.norm, "weight") else next(self.parameters())
        self.head = linear_head(self.num_features, num_classes).to(weight)

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose position table has this model's size, resized from that of square images.

        Raises:
            ValueError: If the table is not that of square images.
        """
        own = self.pos_embed
        if own is None:
            return dict(state)

        def resized(table: Tensor) -> Tensor:
            who = f"{type(self).__name__}.adapt_state"
            fits = table.shape == own.shape
            return table if fits else resize_square(who, table, self.grid, self.class_token, self.class_row)

        return adapted(state, "pos_embed", resized)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs only and recompute the rest in backward; the output stays the same."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers, for learning rates that fall with depth."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def check_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")


def linear_head(dim: int, num_classes: int) -> nn.Module:
    """A classifier, initialised as vision models are; the identity for no classes."""
    check_classes(num_classes)
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def adapted(state: Mapping[str, Tensor], key: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``state`` with ``change`` applied to the entry ``key``, if it is there."""
    return {name: change(value) if name == key else value for name, value in state.items()}


def _check_format(model: nn.Module, output_fmt: str, formats: Sequence[str]) -> None:
    if output_fmt not in formats:
        raise ValueError(
            f"{type(model).__name__}.forward_intermediates: output_fmt must be one of {formats}, got {output_fmt!r}"
        )
