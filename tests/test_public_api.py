"""What is public is listed here, so a removal is a decision."""

from __future__ import annotations

from importlib import import_module

import pytest

PUBLIC = {
    "vssm": ["__version__", "create_detector", "create_model", "list_models", "load_weights"],
    "vssm.kernels": ["available_backends", "causal_conv1d", "scan2d", "selective_scan", "use_backend", "why_not"],
    "vssm.scans": ["Grid", "list_scans", "plot", "register_scan", "scan_array", "scan_rows", "scan_shape", "scan_table",
                   "snake_directions", "to_grid", "to_sequences", "visits_once"],
    "vssm.checkpoints": ["Checkpoint", "DownloadError", "Report", "Transfer", "accept_published_names", "cached_path",
                         "digest", "load_encoder", "load_pretrained", "load_state", "load_weights", "locate",
                         "looks_like", "read_checkpoint", "sha256", "source_url", "write_checkpoint"],
    "vssm.data": ["Augment", "BoxAugment", "CocoDetection", "DetectionData", "DigitScenes", "ImageData", "ImageFolder",
                  "Loader", "MNIST5k", "Pixels", "SceneAugment", "SceneFolder", "SceneSize", "VocDetection"],
    "vssm.tasks": ["Classification", "Detection", "Distillation", "Mesa", "Mixup", "Optimizer", "Schedule",
                   "SemanticSegmentation"],
    "vssm.cli": ["commands", "main"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    """``__all__`` is the list above, and every name in it exists."""
    loaded = import_module(module)
    assert sorted(loaded.__all__) == PUBLIC[module]
    assert all(hasattr(loaded, name) for name in loaded.__all__)
