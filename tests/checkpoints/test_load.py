"""Loading is strict: every key fits, or an error names each one that does not and what the file looks like."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from toy import KEYS, VARIANTS, Toy

from vssm.checkpoints import accept_published_names, load_state, load_weights, looks_like, write_checkpoint
from vssm.models.keys import to_published

TINY, SMALL, BASE = VARIANTS


def published(variant=TINY, **kwargs):
    """A model and its weights under the published names."""
    model = variant.build(**kwargs)
    return model, to_published(model.state_dict(), KEYS)


def same(model, other, size=64, chans=3):
    x = torch.randn(2, chans, size, size)
    return torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("names", ["published", "ours"])
def test_the_round_trip(tmp_path, name, names):
    """A saved model comes back, under the published names and under ours."""
    model, state = published()
    write_checkpoint(state if names == "published" else model.state_dict(), tmp_path / name)
    loaded = TINY.build()
    report = load_weights(loaded, tmp_path / name)
    assert same(model, loaded)
    assert report.tensors == (23, 23)
    assert report.numbers[0] == report.numbers[1] == sum(value.numel() for value in model.state_dict().values())


def test_old_names_and_layouts():
    """Names that only some published files use are understood."""
    model, state = published()
    old = {key.replace(".op.", ".self_attention."): value for key, value in state.items()}
    old = {key: value[:, :, 0, 0] if key.endswith("proj.weight") else value for key, value in old.items()}
    loaded = TINY.build()
    load_state(loaded, {**old, "table": torch.zeros(3)})
    assert same(model, loaded)


def test_a_model_built_by_hand():
    """The class is enough to find the rules, and half precision is cast."""
    model, state = published()
    loaded = Toy(depth=1)
    load_state(loaded, {key: value.half() for key, value in state.items()})
    assert (loaded.stem.conv.weight - model.stem.conv.weight).abs().max() < 1e-3
    assert loaded.stem.conv.weight.dtype == torch.float32


def test_a_wrong_file_names_every_key_and_what_it_looks_like(tmp_path):
    """Small weights into tiny: unexpected keys by group, in the file's own names, and the right architecture."""
    write_checkpoint(published(SMALL)[1], tmp_path / "small.pth")
    model = TINY.build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit toy_tiny; it looks like toy_small") as error:
        load_weights(model, tmp_path / "small.pth")
    text = str(error.value)
    assert text.startswith("load_weights: small.pth (entry 'model') does not fit")
    assert "unexpected keys (16):\n  layers.{0-3}.1.{op.A_logs, op.D, op.D_b, op.proj.weight}" in text
    assert "the file holds 39 tensors" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_keys_have_published_names():
    """Half of a stacked pair is missing under the name that the file should have."""
    state = published()[1]
    del state["layers.2.0.op.D_b"], state["layers.3.0.op.D_b"]
    with pytest.raises(ValueError, match=r"missing keys \(2\):\n  layers\.\{2-3\}\.0\.op\.D_b\n"):
        load_state(TINY.build(), state)


def test_half_of_every_pair():
    """Weights of a one-directional model: the architecture is still recognised."""
    state = {key: value for key, value in published(SMALL)[1].items() if not key.endswith("D_b")}
    with pytest.raises(ValueError, match="looks like toy_small and does not fit it"):
        load_state(SMALL.build(), state)


def test_other_shapes_are_shown():
    """Both shapes stand beside the key, and the way to adapt them."""
    with pytest.raises(ValueError, match=r"adapt=") as error:
        load_state(TINY.build(num_classes=7), published()[1])
    assert "keys of another shape (2):\n  head.weight is (10, 4) in the file, (7, 4) in the model" in str(error.value)


def test_a_file_of_no_family():
    """Nothing in the zoo is like it, and the digest says what it is."""
    with pytest.raises(ValueError, match=r"it looks like no model of the zoo(.|\n)*conv1\.weight"):
        load_state(TINY.build(), {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(2)})


def test_a_detector_is_told_by_its_backbone():
    """The error names the argument that takes the backbone alone."""
    state = {f"backbone.{key}": value for key, value in published()[1].items()} | {"neck.w": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"prefix='backbone\.'"):
        load_state(TINY.build(), state)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_looks_like(variant):
    """Each architecture is known by its own file, whatever its classes."""
    assert looks_like(published(variant)[1]) == [variant.name]
    assert looks_like(published(variant, num_classes=3)[1]) == [variant.name]


def test_another_class_count_is_adapted_on_request():
    """The model keeps its own head; the rest is loaded."""
    model, state = published()
    loaded = TINY.build(num_classes=7)
    head = loaded.head.fc.weight.clone()
    report = load_state(loaded, state, adapt=["classifier"])
    assert torch.equal(loaded.head.fc.weight, head)
    assert torch.equal(loaded.stem.conv.weight, model.stem.conv.weight)
    assert report.adapted == ("head.fc stays the model's own",)
    assert report.tensors == (21, 23)
    assert load_state(TINY.build(num_classes=0), state, adapt=["classifier"]).tensors == (21, 21)


def test_other_channels_are_adapted_on_request():
    """One channel: the sum over the three. Six: repeated and scaled, so that the same image twice gives the same."""
    model, state = published()
    grey, twice = TINY.build(in_chans=1), TINY.build(in_chans=6)
    with pytest.raises(ValueError, match=r"patch_embed\.weight is"):
        load_state(grey, state)
    load_state(grey, state, adapt=["in_chans"])
    load_state(twice, state, adapt=["in_chans"])
    assert torch.equal(grey.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(twice.eval()(x.repeat(1, 2, 1, 1)), model.eval()(x))


def test_another_image_size_is_adapted_on_request():
    """The model resizes its position table."""
    _, state = published()
    loaded = TINY.build(img_size=32)
    report = load_state(loaded, state, adapt=["img_size"])
    assert report.adapted == ("stem.pos_embed is resized from (1, 4, 16, 16) to (1, 4, 8, 8)",)


def test_an_unknown_adaptation():
    """A typing error is no silent partial load."""
    with pytest.raises(ValueError, match="adapt must be a collection of classifier, in_chans, img_size"):
        load_state(TINY.build(), published()[1], adapt="classifier")


def test_a_partial_load_is_explicit_and_counted():
    """Only the named modules may differ."""
    state = published()[1]
    del state["head.bias"], state["layers.0.0.op.A_logs"]
    state["extra.weight"] = torch.zeros(3)
    model = TINY.build()
    kept = model.head.fc.bias.clone()
    with pytest.raises(ValueError, match="allow_partial must be a collection"):
        load_state(model, state, allow_partial="head")
    with pytest.raises(ValueError, match=r"missing keys \(1\):\n  layers\.0\.0\.op\.A_logs"):
        load_state(model, state, allow_partial=["head", "extra"])
    report = load_state(model, state, allow_partial=["head", "extra", "layers.0.0.op"])
    assert torch.equal(model.head.fc.bias, kept)
    assert report.tensors == (21, 23)
    assert "21 of 23 tensors, 97.8 % of" in str(report)


def test_load_state_dict_understands_published_names():
    """Loaders that know no rules (timm's) can be used; copies and pickles of the model understand them too."""
    model, state = published()
    loaded = TINY.build()
    accept_published_names(loaded)
    copied, pickled = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    for each in (loaded, copied, pickled):
        each.load_state_dict(state)
        assert same(model, each)
    trained, saved = TINY.build(), {f"model.{key}": value for key, value in model.state_dict().items()}  # by Lightning
    accept_published_names(trained)
    trained.load_state_dict(saved)
    assert same(model, trained)
    with pytest.raises(RuntimeError, match=r"missing keys \(23\)"):
        trained.load_state_dict({})
    loaded.load_state_dict(BASE.build(dim=4, depth=1).state_dict())
    with pytest.raises(RuntimeError, match="the state dict does not fit toy_tiny; it looks like toy_small"):
        loaded.load_state_dict(published(SMALL)[1])
    nested = torch.nn.Sequential(loaded)
    nested.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert same(model, loaded)
