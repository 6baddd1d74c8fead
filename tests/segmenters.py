"""Tests that every segmenter passes; a family's test class inherits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import Tensor, nn
from torch.export import Dim

import vssm
from vssm.layers.ssm import SelectiveSSM
from vssm.models.keys import shapes_of, to_ours, to_published
from vssm.models.variant import variants


class Segmenter:
    """Tests over one tiny variant and its twin without Mamba. Images are not square."""

    name: str
    twin: ClassVar[dict[str, Any]] = {"mixer": "conv"}          # arguments that take the Mamba out
    spatial_dims: tuple[int, ...] = (2, 3)
    multiple = 32                                               # of sides
    open_axes: tuple[int, ...] = (0,)                           # whose sizes an exported model leaves open
    exported: ClassVar[dict[str, Any]] = {}                     # arguments that make a shallow one, quick to export
    repeats = False                                             # one channel will do for several

    def build(self, **kwargs: Any) -> nn.Module:
        return vssm.create_model(self.name, **kwargs)

    def images(self, spatial_dims: int = 2, batch: int = 2, channels: int = 3, cells: Sequence[int] = (3, 2)) -> Tensor:
        sides = [n * self.multiple for n in ((*cells, 1) if spatial_dims == 3 else cells)]
        return torch.randn(batch, channels, *sides)

    def logits(self, y: Any) -> Tensor:
        return y[0] if isinstance(y, (list, tuple)) else y

    def loss(self, y: Any) -> Tensor:
        outputs = y if isinstance(y, (list, tuple)) else [y]
        return sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)

    def test_logits_have_the_size_of_the_image(self):
        for dims in self.spatial_dims:
            for batch, channels, classes, cells in ((1, 1, 1, (1, 2)), (2, 4, 5, (2, 1))):
                model = self.build(spatial_dims=dims, in_channels=channels, out_channels=classes).eval()
                x = self.images(dims, batch, channels, cells)
                with torch.no_grad():
                    assert self.logits(model(x)).shape == (batch, classes, *x.shape[2:])

    @pytest.mark.parametrize("mamba", [True, False], ids=["mamba", "twin"])
    def test_trains_every_parameter(self, mamba):
        torch.manual_seed(1)
        for dims in self.spatial_dims:
            model = self.build(spatial_dims=dims, out_channels=2, **({} if mamba else self.twin)).train()
            self.loss(model(self.images(dims, batch=4, cells=(2, 1)))).backward()
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
            assert [n for n, p in model.named_parameters() if not p.grad.any()] == []
            assert any(isinstance(module, SelectiveSSM) for module in model.modules()) == mamba

    def test_refuses_images_that_it_cannot_read(self):
        model, x = self.build(), self.images()
        with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \(2, 3, "):
            model(x[..., 0])
        with pytest.raises(ValueError, match=r"images must have 3 (or 1 )?channels, got 2 in "):
            model(x[:, :2])
        if self.multiple > 1:
            sides, padded = (x.shape[2] - 1, 1), (x.shape[2], self.multiple)
            message = rf"multiple of {self.multiple}, got \({sides[0]}, 1\); pad it to \({padded[0]}, {padded[1]}\)"
            with pytest.raises(ValueError, match=message):
                model(x[..., :-1, :1])

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"spatial_dims": 4}, "spatial_dims must be "),
            ({"in_channels": 0}, "in_channels must be a whole number from 1, got 0"),
            ({"out_channels": 2.0}, "out_channels must be a whole number from 1, got 2.0"),
            ({"mixer": "attention"}, "mixer must be one of 'scan', 'conv', got 'attention'"),
        ],
    )
    def test_refuses_arguments_that_mean_nothing(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.build(**kwargs)

    def test_one_channel_is_repeated_where_it_was_published_so(self):
        if not self.repeats:
            return
        model, x = self.build().eval(), self.images(channels=1)
        assert torch.equal(self.logits(model(x)), self.logits(model(x.repeat(1, 3, 1, 1))))

    def test_gradient_checkpointing_changes_nothing(self):
        model, x = self.build().train(), self.images()
        results = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            torch.manual_seed(2)
            y = model(x)
            self.loss(y).backward()
            results.append([self.logits(y), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_bfloat16_stays_near_float32(self):
        model, x = self.build().eval(), self.images()
        with torch.no_grad():
            expected = self.logits(model(x))
            with torch.autocast("cpu", torch.bfloat16):
                y = self.logits(model(x))
        # Root mean square: where the few channels of a narrow model nearly agree, a norm magnifies single roundings.
        assert (y - expected).square().mean().sqrt() / expected.std() < 2 * TOLERANCE[torch.bfloat16]

    def test_trains_in_bfloat16(self):
        model = self.build().train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(model(self.images()))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_a_sample_does_not_depend_on_its_batch(self):
        model, x = self.build().eval(), self.images(batch=3)
        with torch.no_grad():
            assert error(self.logits(model(x))[1:2], self.logits(model(x[1:2]))) < TOLERANCE[torch.float32]

    @pytest.mark.parametrize(
        "open_sides", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["open_batch", "open_sides"]
    )
    def test_exports_with_open_sizes(self, open_sides):
        axes = self.open_axes if open_sides else (0,)
        model, x = self.build(**self.exported).eval(), self.images()
        program = torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys(axes, Dim.AUTO),)).module()
        other = self.images(batch=3, cells=(3, 2) if axes == (0,) else (2, 4))
        with torch.no_grad():
            assert error(self.logits(program(other)), self.logits(model(other))) < TOLERANCE[torch.float32]

    def test_is_made_on_the_meta_device(self):
        with torch.device("meta"):
            model = self.build()
        assert all(p.is_meta for p in model.parameters())

    def test_keys_lead_there_and_back(self):
        ours, rules = self.build().state_dict(), variants()[self.name].keys
        published = to_published(ours, rules)
        loaded = to_ours(published, rules, {key: tuple(value.shape) for key, value in ours.items()})
        assert set(loaded) == set(ours)
        assert all(torch.equal(loaded[key], ours[key]) for key in ours)

    def test_no_weight_decay_names_parameters(self):
        model = self.build()
        assert model.no_weight_decay() <= set(shapes_of(model))
