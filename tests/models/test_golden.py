"""The published models: formula weights under the published keys give the recorded outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vssm.cli import verify
from vssm.models import vim, vmamba

FILES = sorted(Path(__file__).parent.parent.glob("golden/v*m*/*.json"))
QUICK = {                                                       # small images, small models; the rest is slow
    "vim_tiny_patch16_96x160", "vim_seg_tiny_128", "vim_seg_small_rope_128", "ops_cross_scan", "ops_selective_scan",
    "vmamba_tiny_s1l8_backbone", "vmamba_tiny_s1l8_rootfile", "vanilla_vmamba_tiny_rootfile",
}  # fmt: skip


def marked(path: Path):
    return pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("path", [marked(path) for path in FILES])
def test_agrees_with_the_published_code_in_float64(path, capsys):
    assert verify.main([str(path)]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize("name", ["vim/vim_tiny_patch16_96x160", "vmamba/vmamba_tiny_s1l8_rootfile"])
def test_agrees_with_the_published_code_in_float32(name, capsys):
    path = next(path for path in FILES if path.match(f"{name}.json"))
    assert verify.main([str(path), "--dtype", "float32"]) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in vmamba.VARIANTS + vim.VARIANTS if v.weights], ids=lambda v: v.name)
def test_the_zoo_has_the_published_size(variant):
    """Parameters of the sheets' tables."""
    expected = {
        "vanilla_vmamba_tiny": 22893448, "vanilla_vmamba_small": 44417416, "vanilla_vmamba_base": 76254056,
        "vmamba_tiny_s2l5": 30705832, "vmamba_small_s2l15": 50147752, "vmamba_base_s2l15": 88557800,
        "vmamba_tiny_s1l8": 30249064, "vmamba_small_s1l20": 49012840, "vmamba_base_s1l20": 86614504,
        "vmamba_tiny": 30249064, "vmamba_small": 49012840, "vmamba_base": 86614504,
        "vim_tiny": 7148008, "vim_tiny_stride8": 7250344, "vim_small": 25796584, "vim_small_stride8": 26001256,
        "vim_base": 97598440,
    }  # fmt: skip
    assert sum(p.numel() for p in variant.build().parameters()) == expected[variant.name]
