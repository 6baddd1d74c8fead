"""``vssm flops``: what a model costs, against sums by hand and published figures."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vssm.cli.flops import PUBLISHED, Uncounted, count, flops_of, input_shape, input_size, main
from vssm.registries.zoo import find, list_models

SAME = ("vmamba", "vanilla_vmamba", "plainmamba", "spatialmamba", "localvmamba")  # families that count as we do
DIFFERENT = ("vim", "localvim", "msvmamba", "vssd")


def test_a_linear_layer_and_attention():
    """2 for each multiply-add, in the module where it happens; attention is two products."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x):
            x = self.linear(x)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    for device in ("cpu", "meta"):
        found = count(Small().to(device), torch.ones(2, 1, 3, 6, device=device))
        products = 2 * 2 * (2 * 3 * 3 * 5)
        assert found.total == 2 * (2 * 3 * 6 * 5) + products
        assert sum(found.modules["linear"].values()) == 2 * (2 * 3 * 6 * 5)
        assert found.as_papers_count == found.total / 2
    trained = count(Small(), torch.ones(2, 1, 3, 6), backward=True)
    assert trained.total == 2 * (2 * 3 * 6 * 5) * 2 + 3 * products  # no gradient of the input


def agrees(name: str) -> bool:
    """To the digits printed, or 2 %."""
    return abs(flops_of(name).as_papers_count / 1e9 / PUBLISHED[name] - 1) < 0.02


@pytest.mark.parametrize("name", ["vmamba_tiny", "vanilla_vmamba_tiny", "plainmamba_l1", "localvmamba_tiny"])
def test_agrees_with_the_published_figure(name):
    assert agrees(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_every_published_figure_that_counts_the_scan_the_same_way(name):
    """Those that do not are at least of the same size."""
    if name.startswith(SAME):
        assert agrees(name)
    else:
        assert name.startswith(DIFFERENT)
        assert abs(flops_of(name).as_papers_count / 1e9 / PUBLISHED[name] - 1) < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_is_counted_without_memory(name):
    try:
        assert flops_of(name).total > 0
    except Uncounted:
        assert find(name).task == "pretraining"


def test_a_cost_that_the_mask_decides_is_not_guessed():
    with pytest.raises(Uncounted, match="what mambamim_nano computes depends on the values of its input"):
        flops_of("mambamim_nano")


def test_costs_grow_with_the_image_and_the_batch():
    once = flops_of("test_vmamba", [32])
    assert flops_of("test_vmamba", [32], batch=3).total == 3 * once.total
    assert flops_of("test_vmamba", [32, 64]).operations["aten.convolution"] == 2 * once.operations["aten.convolution"]
    assert flops_of("test_vmamba", [32], backward=True).total > 2 * once.total


def test_sizes_of_inputs():
    """Those of the weights, of the row, or the task's."""
    assert input_shape(find("vmamba_tiny")) == (1, 3, 224, 224)
    assert input_shape(find("vim_nano")) == (1, 3, 32, 32)
    assert input_shape(find("segmamba"), batch=2)[:2] == (2, 4)
    assert len(input_shape(find("segmamba"))) == 5
    assert input_shape(find("segmamba"), [32, 48, 64])[2:] == (32, 48, 64)
    assert input_shape(find("vivim_b3")) == (1, 5, 3, 256, 256)
    assert (input_size(find("vivim_b3")), input_size(find("vim_nano"))) == ((5, 256, 256), (32, 32))
    assert flops_of("vim_nano", [64]).total > flops_of("vim_nano").total


def test_the_command_prints_operations_modules_and_the_figure_of_papers(capsys):
    assert main(["vmamba_tiny", "--by-module", "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "input 1×3×224×224, 30.25 M parameters" in out
    assert re.search(r"^vssm\.selective_scan +0\.063", out, re.MULTILINE)
    assert re.search(r"^total +9\.688$", out, re.MULTILINE)
    assert [line.split()[0] for line in out[out.index("module ") :].splitlines()[1:4]] == ["stem", "stages", "head"]
    assert "stages.0" not in out
    assert "as papers count: 4.88 G, published 4.9" in out
    assert main(["vmamba_tiny", "--size", "64", "--backward"]) == 0
    out = capsys.readouterr().out
    assert "vssm.selective_scan_backward" in out
    assert "published" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vmamba_tinny"], "vssm flops: no model named 'vmamba_tinny'; did you mean vmamba_tiny"),
        (["vmamba_tiny", "--size", "1", "2", "3"], "takes 2 sizes from 1, or one for all sides, got [1, 2, 3]"),
        (["vmamba_tiny", "--size", "0"], "vssm flops: vmamba_tiny takes 2 sizes from 1"),
    ],
)
def test_what_does_not_fit_is_refused(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
