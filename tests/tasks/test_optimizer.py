"""Which parameter is decayed, and the learning rate of each step."""

from __future__ import annotations

import math

import pytest
import timm
from torch import nn

import vssm  # noqa: F401  registers the models
from vssm.tasks.optimizer import Optimizer, Schedule


def decays(model, groups):
    """Weight decay of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


STATE_SPACE = {"A_log", "D", "dt_bias"}
AS_PUBLISHED = {"test_vim": {"A_log"}, "test_vmamba": {"A_log", "dt_bias"}}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("ssm_decay", ["none", "published"])
@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_norms_biases_and_state_space_parameters_are_not_decayed(name, ssm_decay, layer_decay):
    """Except those that the published recipe decayed, where it is asked for."""
    model = timm.create_model(name, num_classes=2)
    optimizer = Optimizer(weight_decay=0.1, ssm_decay=ssm_decay, layer_decay=layer_decay)
    found = decays(model, optimizer.groups(model))
    assert found.keys() == dict(model.named_parameters()).keys()
    decayed = AS_PUBLISHED[name] if ssm_decay == "published" else set()
    for key, decay in found.items():
        last = key.rpartition(".")[2]
        if last in STATE_SPACE:
            assert decay == (0.1 if last in decayed else 0.0), key
        elif last == "bias" or "norm" in key or last in ("pos_embed", "cls_token"):
            assert decay == 0.0, key
        else:
            assert decay == 0.1, key
    assert {key.rpartition(".")[2] for key in found} >= STATE_SPACE


def test_layer_decay_lowers_the_rate_towards_the_stem():
    model = timm.create_model("test_vit", num_classes=2)
    optimizer = Optimizer(lr=1.0, layer_decay=0.5).build(model, batch=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    Schedule(warmup_epochs=0).build(optimizer, steps=10, epochs=1)
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = [rates["patch_embed.proj.weight"], rates["blocks.0.mlp.fc1.weight"], rates["blocks.1.mlp.fc1.weight"]]
    assert rates["head.weight"] == 1.0
    assert layers == sorted(layers)
    assert layers[2] == 2 * layers[1] == 4 * layers[0]


def test_the_rate_is_scaled_by_the_whole_batch():
    model = nn.Linear(2, 2)
    assert Optimizer(lr=1e-3).build(model, batch=64).param_groups[0]["lr"] == 1e-3
    assert Optimizer(lr=1e-3, lr_base_batch=1024).build(model, batch=512).param_groups[0]["lr"] == 5e-4


def test_the_rate_warms_up_and_falls_along_a_cosine():
    model = nn.Linear(2, 2)
    optimizer = Optimizer(lr=1.0, weight_decay=0.0).build(model, batch=1)
    scheduler = Schedule(warmup_epochs=2, warmup_lr=0.0, min_lr=0.2).build(optimizer, steps=50, epochs=10)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 50):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[30] == pytest.approx(0.6)
    assert rates[49] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 39 / 40)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (dict(shape="steps", decay_epochs=(4, 8), decay_rate=0.5), {5: 0.5, 18: 1.0, 20: 0.5, 38: 0.5, 40: 0.25}),
        (dict(shape="poly", min_lr=0.2), {5: 0.5, 10: 1.0, 30: 0.6, 40: 0.4}),
        (dict(shape="poly", min_lr=0.0, power=2.0), {30: 0.25}),
    ],
    ids=["steps", "line", "square"],
)
def test_the_rate_falls_in_other_shapes(schedule, expected):
    optimizer = Optimizer(lr=1.0).build(nn.Linear(2, 2), batch=1)
    scheduler = Schedule(warmup_epochs=2, warmup_lr=0.0, **schedule).build(optimizer, steps=50, epochs=10)
    for step, rate in expected.items():
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate), step


def test_epochs_of_decay_belong_to_steps():
    for options in ({"shape": "steps"}, {"decay_epochs": (3,)}):
        with pytest.raises(ValueError, match="Schedule: decay_epochs must be given with shape 'steps'"):
            Schedule(**options)


def test_arguments_reach_the_optimizer_that_has_them():
    model = nn.Linear(2, 2)
    adamw = Optimizer(betas=(0.8, 0.9), eps=1e-6).build(model, batch=1)
    assert (type(adamw).__name__, adamw.defaults["betas"], adamw.defaults["eps"]) == ("AdamW", (0.8, 0.9), 1e-6)
    sgd = Optimizer(name="sgd", momentum=0.7).build(model, batch=1)
    assert (type(sgd).__name__, sgd.defaults["momentum"]) == ("SGD", 0.7)
