"""Every configuration in configs/ fits the signatures, names models that exist, and says whether it was run."""

from __future__ import annotations

import re

import pytest
import timm
import yaml
from tree import ROOT

import vssm
from vssm.cli.train import main

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def marked(path):
    """Recipes that differ from another one by the name of a backbone are slow."""
    alike = path.stem.startswith("mask_rcnn_") and path.stem != "mask_rcnn_vmamba_tiny_coco"
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if alike else ())


@pytest.mark.parametrize("path", [marked(path) for path in CONFIGS])
def test_a_configuration_is_accepted_as_it_stands(path, capsys):
    if path.parent.name == "segmentation":
        pytest.importorskip("monai", reason="needs the extra medical")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    arguments = printed["model"]["init_args"]
    model = arguments.get("model") or arguments["backbone"] or arguments["detector"]
    assert timm.is_model(model) or model in vssm.list_models()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_what_came_out_of_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# Not run here: ") or re.search(r"test (accuracy|mean Dice|mAP|mIoU) 0\.\d", first)
