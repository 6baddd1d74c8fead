"""Every configuration in configs/ fits the signatures, names models that exist, and says whether it was run."""

from __future__ import annotations

import pytest
import timm
import yaml
from tree import ROOT

from vssm.cli.train import main

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_accepted_as_it_stands(path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert timm.is_model(printed["model"]["init_args"]["model"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_what_came_out_of_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# Not run here: ") or "test accuracy 0." in first
