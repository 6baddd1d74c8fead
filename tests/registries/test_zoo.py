"""The zoo: models by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import toy
from toy import KEYS, Toy

from vssm.checkpoints import write_checkpoint
from vssm.models import variant as rows
from vssm.models.keys import to_published
from vssm.models.variant import Variant, Weights
from vssm.registries.timm import register
from vssm.registries.zoo import _as_people_count, create_model, find, list_models

pytestmark = pytest.mark.usefixtures("toys")


def test_a_model_by_name():
    """The row's arguments, with the caller's over them."""
    model = create_model("toy_base", num_classes=7, in_chans=1, scan="hilbert")
    assert isinstance(model, Toy)
    assert (model.num_features, model.scan) == (8, "hilbert")
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "hint"), [("toy_tinny", "did you mean toy_tiny"), ("resnet50", r"list_models\(\) names them")]
)
def test_an_unknown_name(name, hint):
    """The error suggests the nearest ones."""
    with pytest.raises(ValueError, match=rf"create_model: no model named '{name}'; .*{hint}"):
        create_model(name)


def test_the_other_world_s_name_of_an_argument():
    """Who knows timm writes num_classes for a segmenter, who knows MONAI in_channels for a classifier."""
    with pytest.raises(TypeError, match="toy_tiny is for classification, where in_channels is called in_chans"):
        create_model("toy_tiny", in_channels=1)


def test_a_licence_that_nobody_uses_is_an_error():
    """A misspelt licence is not an empty list."""
    with pytest.raises(ValueError, match=r"license must be one of permissive, .*, got 'commercial-ok'"):
        list_models(license="commercial-ok")


def test_lists():
    """Names by wildcard, weights, family and licence."""
    assert list_models() == ["toy_base", "toy_small", "toy_tiny"]
    assert list_models("*_t*") == ["toy_tiny"]
    assert list_models(["*_t*", "*base"], exclude="toy_b*") == ["toy_tiny"]
    assert list_models(pretrained=True) == ["toy_small", "toy_tiny"]
    assert list_models(pretrained=True, license="permissive") == ["toy_small"]
    assert list_models(license="mit") == ["toy_small"]
    assert list_models(family="toy") == list_models()
    assert list_models(scan="hilbert") == list_models()
    assert list_models(scan="interslice", task="classification") == list_models()
    assert list_models(task="segmentation") == []


def test_lists_by_size():
    """Fewer parameters than that, not as many."""
    sizes = {name: sum(p.numel() for p in find(name).build().parameters()) for name in list_models()}
    assert len(set(sizes.values())) > 1
    for limit in (*sizes.values(), 1, 1e9):
        assert list_models(params_below=limit) == [name for name in list_models() if sizes[name] < limit]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scan": "hilbrt"}, "no order named 'hilbrt'; did you mean hilbert"),
        ({"task": "regression"}, "list_models: task must be one of classification, segmentation, "),
        ({"family": "toys"}, "list_models: family must be one of toy, got 'toys'"),
    ],
)
def test_a_filter_that_does_not_exist_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        list_models(**asked)


def test_numbers_sort_as_numbers():
    """Depth 20 comes after depth 8."""
    assert sorted(["m_s1l20", "m_s1l8", "m"], key=_as_people_count) == ["m", "m_s1l8", "m_s1l20"]


def test_a_checkpoint_of_the_published_names(tmp_path):
    """``checkpoint_path`` takes the entry "model" though the file has an average too, and is strict."""
    source = create_model("toy_tiny").eval()
    state = to_published(source.state_dict(), KEYS)
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "x.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(create_model("toy_tiny", checkpoint_path=tmp_path / "x.pth").eval()(x), source(x))
    with pytest.raises(ValueError, match="it looks like toy_tiny"):
        create_model("toy_small", checkpoint_path=tmp_path / "x.pth")
    with pytest.raises(ValueError, match="7, 4"):
        create_model("toy_tiny", checkpoint_path=tmp_path / "x.pth", num_classes=7)
    with pytest.raises(ValueError, match="drop one"):
        create_model("toy_tiny", checkpoint_path=tmp_path / "x.pth", pretrained=True)
    maps = create_model("toy_tiny", checkpoint_path=tmp_path / "x.pth", features_only=True).eval()(x)
    torch.testing.assert_close(maps, source.forward_intermediates(x, intermediates_only=True))


def test_the_short_way_to_weights(tmp_path):
    """``write_checkpoint`` of our own names is a checkpoint as well."""
    source = create_model("toy_tiny").eval()
    write_checkpoint(source.state_dict(), tmp_path / "x.safetensors")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(create_model("toy_tiny", checkpoint_path=tmp_path / "x.safetensors").eval()(x), source(x))


def test_rows_that_timm_has_no_place_for(tmp_path, monkeypatch):
    """A segmenter is listed by its task, built and loaded by ``create_model``, and unknown to timm."""
    source = create_model("toy_tiny").eval()
    write_checkpoint(source.state_dict(), tmp_path / "x.safetensors")
    weights = Weights(file=str(tmp_path / "x.safetensors"), license="MIT", origin_url="", paper="", num_classes=10)
    row = Variant("toy_seg", Toy, {}, KEYS, {"in10": weights}, task="segmentation", first_conv="stem.conv")
    bare = replace(row, name="toy_bare", weights={})
    monkeypatch.setattr(toy, "VARIANTS", [*toy.VARIANTS, row, bare])
    rows.variants.cache_clear()
    assert list_models(task="segmentation") == ["toy_bare", "toy_seg"]
    assert "toy_seg" not in list_models(task="classification")
    register([row])
    assert not timm.is_model("toy_seg")
    x = torch.randn(1, 3, 64, 64)
    for loaded in (
        create_model("toy_seg", pretrained=True),
        create_model("toy_seg.in10", pretrained=True),
        create_model("toy_seg", checkpoint_path=tmp_path / "x.safetensors"),
    ):
        assert torch.equal(loaded.eval()(x), source(x))
    with pytest.raises(ValueError, match="toy_bare has no published weights; drop pretrained=True"):
        create_model("toy_bare", pretrained=True)
    with pytest.raises(ValueError, match="no published weights 'other'; published: in10"):
        create_model("toy_seg.other", pretrained=True)
