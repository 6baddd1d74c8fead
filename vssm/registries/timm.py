"""The zoo in timm: after ``import vssm``, ``timm.create_model("vmamba_tiny", pretrained=True, features_only=True)``.

Every variant becomes an entry point with a pretrained cfg for each of its published files. Weights come in through
``vssm.checkpoints``, whatever the source (url, hub id, file, local directory): strict, whether the names are published
or ours. A difference that the caller asked for (``num_classes``, ``in_chans``, ``img_size``) is adapted as timm does;
any other is an error.

``timm.create_model(..., checkpoint_path=FILE)`` reads the file with timm's own reader, which prefers ``model_ema``
where a file has both; ``vssm.create_model(..., checkpoint_path=FILE)`` takes ``model``, the entry behind the published
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    load_state_dict_from_hf,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from vssm.checkpoints import DownloadError, accept_published_names, load_pretrained, load_state, load_weights
from vssm.checkpoints.files import allow_stand_ins
from vssm.models.variant import Variant, Weights

__all__ = ["default_cfgs", "register"]

default_cfgs: dict[str, Any] = {}                           # register_model looks here by the entry point's name
# features_only; flatten_sequential is for feature_cls="list", which needs it and which timm's getter ignores
HIERARCHICAL = {"out_indices": 4, "feature_cls": "getter", "flatten_sequential": True}
ISOTROPIC = {"out_indices": 3, "feature_cls": "getter"}
SAVED = ("model.safetensors", "pytorch_model.bin")          # what timm.models.save_for_hf writes


def register(variants: Iterable[Variant]) -> None:
    """Make each classifier among the variants an entry point of timm."""
    allow_stand_ins()                                        # timm's reader, too, meets them in published files
    for variant in variants:
        if variant.task != "classification":
            continue
        default_cfgs.update(generate_default_cfgs(_cfgs(variant)))
        globals()[variant.name] = register_model(_entry_point(variant))


def _entry_point(variant: Variant) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        cfg = resolve_pretrained_cfg(variant.name, pretrained_cfg, pretrained_cfg_overlay)

        def build(**arguments: Any) -> nn.Module:
            model = variant.build(**arguments)
            if pretrained:
                _load(model, variant, cfg, arguments, cache_dir)
            accept_published_names(model)
            return model

        # timm must not load: its loader is not strict where classes differ, and knows no key rules for local folders
        return build_model_with_cfg(
            build,
            variant.name,
            pretrained=False,
            pretrained_cfg=cfg.to_dict(),
            feature_cfg=dict(HIERARCHICAL if variant.pool_size else ISOTROPIC),
            **kwargs,
        )

    create.__name__ = create.__qualname__ = variant.name
    create.__doc__ = variant.description or f"{variant.name} of {variant.model.__module__}"
    return create


def _cfgs(variant: Variant) -> dict[str, dict[str, Any]]:
    """The variant's pretrained cfgs by ``name.tag``, in timm's words; one without a source if it has no weights."""
    model = {
        "first_conv": variant.first_conv,
        "classifier": variant.classifier,
        "pool_size": variant.pool_size,
        "fixed_input_size": variant.fixed_input_size,
    }
    if not variant.weights:
        size = variant.kwargs.get("img_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        inputs = (variant.kwargs.get("in_chans", 3), height, width)
        return {variant.name: {**model, "input_size": inputs, "num_classes": variant.kwargs.get("num_classes", 1000)}}
    return {f"{variant.name}.{tag}": {**model, **_cfg(weights)} for tag, weights in variant.weights.items()}


def _cfg(weights: Weights) -> dict[str, Any]:
    return {
        "url": weights.url,
        "hf_hub_id": weights.hf_hub_id,
        "hf_hub_filename": weights.hf_hub_filename,
        "file": weights.file,
        "num_classes": weights.num_classes,
        "input_size": weights.input_size,
        "crop_pct": weights.crop_pct,
        "interpolation": weights.interpolation,
        "mean": weights.mean,
        "std": weights.std,
        "license": weights.license.lower(),
        "origin_url": weights.origin_url,
        "paper_ids": weights.paper,
        "notes": (weights.notes,) if weights.notes else None,
    }


def _load(
    model: nn.Module, variant: Variant, cfg: Any, arguments: dict[str, Any], cache_dir: str | Path | None
) -> None:
    """Load what ``cfg`` names into ``model``; ``arguments`` are those the model was built with."""
    adapt = _asked_for(cfg, arguments)
    if cfg.state_dict:
        load_state(model, cfg.state_dict, adapt=adapt)
    elif cfg.source == "local-dir":
        load_weights(model, _saved_in(Path(cfg.file)), adapt=adapt)
    elif cfg.hf_hub_id and not cfg.hf_hub_filename and not cfg.file:
        load_state(model, _from_hub(cfg.hf_hub_id, cache_dir), adapt=adapt, source=cfg.hf_hub_id)
    elif cfg.file or cfg.hf_hub_id or cfg.url:
        load_pretrained(model, _weights(variant, cfg), cache_dir=cache_dir, adapt=adapt)
    else:
        raise ValueError(f"create_model: {variant.name} has no published weights; drop pretrained=True")


def _asked_for(cfg: Any, arguments: dict[str, Any]) -> list[str]:
    """The adaptations that the arguments call for, given what the weights were made for."""
    channels, *source_size = cfg.input_size
    size = arguments.get("img_size", source_size)
    differs = {
        "classifier": arguments.get("num_classes", cfg.num_classes) != cfg.num_classes,
        "in_chans": arguments.get("in_chans", channels) != channels,
        "img_size": ([size, size] if isinstance(size, int) else list(size)) != source_size,
    }
    return [name for name, asked in differs.items() if asked]


def _weights(variant: Variant, cfg: Any) -> Weights:
    """The row's own description of what ``cfg`` points at (it knows the entry and the SHA-256), or a bare one."""
    place = {name: getattr(cfg, name) for name in ("file", "url", "hf_hub_id", "hf_hub_filename")}
    for weights in variant.weights.values():
        if all(getattr(weights, name) == value for name, value in place.items()):
            return weights
    return Weights(license=cfg.license or "unknown", origin_url=cfg.origin_url or "", paper="", **place)


def _saved_in(folder: Path) -> Path:
    for name in SAVED:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"create_model: {folder} has neither {' nor '.join(SAVED)}")


def _from_hub(name: str, cache_dir: str | Path | None) -> dict[str, Any]:
    try:
        return load_state_dict_from_hf(name, cache_dir=cache_dir)
    except OSError as error:
        raise DownloadError(
            f"create_model: could not fetch {name} ({type(error).__name__}: {error}); fetch its config.json and "
            f"{SAVED[0]} by hand into a folder and name that: create_model('local-dir:FOLDER', pretrained=True)"
        ) from error
