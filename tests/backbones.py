"""What timm and training demand of a classifier, as a class of tests that a family's test file inherits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, get_notrace_functions, get_notrace_modules
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from tolerance import TOLERANCE, error
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vssm  # noqa: F401  (registers the models)
from vssm.scans import list_scans


class Backbone:
    """Tests over one tiny variant. Images are not square, and no side is a multiple of the stride."""

    name: str
    size = (45, 37)
    isotropic = False
    op = "selective_scan"                                       # what FX must see as a leaf
    decayed = frozenset({"A_log", "dt_bias"})                   # parameters of the SSM that the published recipe decays
    projections = frozenset({"x_proj", "dt_weight"})            # which it decays, too
    head_ratio = 1                                              # channels before the classifier over those of the map
    undecayed: tuple[str, ...] = ()                             # what else is not decayed, beside norms and biases
    refused_orders: tuple[str, ...] = ()                        # orders whose rows the mixers cannot choose from

    def build(self, **kwargs: Any) -> nn.Module:
        return timm.create_model(self.name, **{"num_classes": 5, **kwargs})

    def images(self, batch: int = 2, channels: int = 3) -> Tensor:
        return torch.randn(batch, channels, *self.size)

    def test_trains_every_parameter(self):
        """Gradients reach all of them, with any number of channels and with dropout."""
        for channels in (1, 3, 4):
            model = self.build(in_chans=channels, drop_path_rate=0.1, drop_rate=0.1).train()
            loss = torch.nn.functional.cross_entropy(model(self.images(8, channels)), torch.arange(8) % 5)
            loss.backward()
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    @pytest.mark.parametrize(
        ("option", "message"),
        [({"drop_path_rate": 1.0}, "drop_path_rate must be from 0 to below 1, got 1.0"),
         ({"num_classes": -1}, r"num_classes must be 0 \(no classifier\) or more, got -1")],
    )  # fmt: skip
    def test_refuses_options_that_mean_nothing(self, option, message):
        with pytest.raises(ValueError, match=message):
            self.build(**option)

    def test_drop_path_rises_from_block_to_block(self):
        """As published: from 0 in a straight line, one rate for all branches of a block."""
        model = self.build(drop_path_rate=0.3)
        blocks = model.blocks if self.isotropic else [block for stage in model.stages for block in stage.blocks]
        rates = [{m.drop_prob for m in block.modules() if isinstance(m, DropPath)} or {0.0} for block in blocks]
        assert all(len(rate) == 1 for rate in rates)
        assert [rate.pop() for rate in rates] == pytest.approx(torch.linspace(0, 0.3, len(blocks)).tolist())

    def test_has_the_parts_of_a_timm_model(self):
        model, x = self.build().eval(), self.images()
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size) == (2, self.head_ratio * model.num_features)
        classifier = model.get_classifier()                     # two of them are averaged
        assert not isinstance(classifier, nn.Module) or torch.equal(classifier(pooled), model(x))
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert model.num_classes == 7
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        assert self.build(num_classes=0, global_pool="")(x).shape == features.shape

    def test_intermediates_are_what_the_stages_return(self):
        model, x = self.build().eval(), self.images()
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert len(maps) == len(model.feature_info)
        for info, y in zip(model.feature_info, maps, strict=True):
            assert list(y.shape) == [2, info["num_chs"], *self.cells(info["reduction"])]
        only = model.forward_intermediates(x, indices=[-1, 0], stop_early=True, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(only, (maps[0], maps[-1]), strict=True)] == [True, True]

    def cells(self, reduction: int) -> list[int]:
        return [math.ceil(size / reduction) for size in self.size]

    def test_pruning_keeps_what_the_indices_need(self):
        model, x = self.build().eval(), self.images()
        expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected[0])
        assert len(model.blocks if self.isotropic else model.stages) == 2

    def test_features_only_gives_maps_of_the_declared_shape(self):
        model = self.build(num_classes=0, features_only=True).eval()
        maps = model(self.images())
        assert [y.shape[1] for y in maps] == model.feature_info.channels()
        for y, reduction in zip(maps, model.feature_info.reduction(), strict=True):
            assert list(y.shape[2:]) == self.cells(reduction)

    def test_gradient_checkpointing_changes_nothing(self):
        model, x = self.build().train(), self.images()
        grads = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads.append([y, *(p.grad.clone() for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_fx_sees_the_kernels_as_leaves_forward_and_backward(self):
        model, x = self.build().eval(), self.images()
        tracer = dict(
            leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
        )
        _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
        assert any(self.op in node for node in nodes)
        graph = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=tracer)
        (y,) = graph(x).values()
        assert torch.equal(y, model(x))
        next(iter(graph(x).values())).sum().backward()
        assert all(p.grad is not None for p in graph.parameters())

    @pytest.mark.parametrize("scan", list_scans(2))
    def test_every_order_trains(self, scan):
        """One step in the direction of the gradient lowers the loss; or the model says that it needs other rows."""
        if scan in self.refused_orders:
            with pytest.raises(ValueError, match=f"'{scan}' follow the grid; choose another"):
                self.build(scan=scan)
            return
        model, x, target = self.build(scan=scan), self.images(), torch.tensor([1, 3])
        losses = []
        for _ in range(2):
            losses.append(torch.nn.functional.cross_entropy(model(x), target))
            grads = torch.autograd.grad(losses[-1], list(model.parameters()))
            assert all(grad.isfinite().all() for grad in grads)
            with torch.no_grad():
                step = 0.02 / torch.stack([grad.norm() for grad in grads]).norm()
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    parameter -= step * grad
        assert losses[1] < losses[0]

    def test_weight_decay_is_that_of_the_published_recipe(self):
        model = self.build()
        none, some = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        names = {id(p): n for n, p in model.named_parameters()}
        leaves = {n.rpartition(".")[2] for p in some["params"] if ".ssm." in (n := names[id(p)])}
        assert leaves == self.projections | self.decayed
        outside = {n for p in none["params"] if ".ssm." not in (n := names[id(p)]) and not n.endswith(".bias")}
        norms = {f"{n}.weight" for n, m in model.named_modules() if "Norm" in type(m).__name__}
        assert {n for n in outside - norms if not n.endswith(self.undecayed)} == set()
        assert norms <= outside
        assert model.no_weight_decay() <= set(names.values())

    def test_layers_are_grouped_by_depth(self):
        model = self.build()
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert set(groups) == {n for n, _ in model.named_parameters()}
        depth = [groups[n] for n in groups if ".A_log" in n]
        assert depth == sorted(set(depth))
        assert groups[f"{model.pretrained_cfg['first_conv']}.weight"] == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_stays_near_float32(self, dtype):
        model, x = self.build().eval(), self.images()
        expected = model(x)
        with torch.autocast("cpu", dtype):
            y = model(x)
        assert error(y, expected) < 5 * TOLERANCE[dtype]        # several layers of rounded products
        assert error(model.to(dtype)(x.to(dtype)), expected) < 5 * TOLERANCE[dtype]

    def test_a_sample_does_not_depend_on_its_batch(self):
        model, x = self.build().eval(), self.images(3)
        assert error(model(x)[1:2], model(x[1:2])) < TOLERANCE[torch.float32]

    def test_is_made_on_the_meta_device(self):
        with torch.device("meta"):
            model = self.build()
        assert all(p.is_meta for p in model.parameters())
