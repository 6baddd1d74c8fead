"""The zoo in timm: what timm's users expect, and loading by our strict rules whatever the source."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained, save_for_hf
from toy import KEYS, VARIANTS, WEIGHTS, save_as_trained

from vssm.checkpoints import DownloadError, read_checkpoint, write_checkpoint
from vssm.models.keys import to_published
from vssm.registries.timm import register

pytestmark = pytest.mark.usefixtures("toys")
X = torch.randn(2, 3, 64, 64)


@pytest.fixture
def source():
    """A trained model, so to speak."""
    return timm.create_model("toy_tiny").eval()


@pytest.fixture
def published(source, tmp_path):
    """Its file under published names, with a yacs-like node as training scripts leave it."""
    path = tmp_path / "published.pth"
    save_as_trained(to_published(source.state_dict(), KEYS), path)
    return path


def test_the_cfg_describes_the_weights():
    """Everything that timm's data pipeline and model cards ask for."""
    cfg = get_pretrained_cfg("toy_small.in10")
    assert (cfg.url, cfg.license, cfg.num_classes, cfg.input_size) == (WEIGHTS.url, "mit", 10, (3, 64, 64))
    assert (cfg.first_conv, cfg.classifier, cfg.pool_size) == ("stem.conv", "head.fc", (2, 2))
    assert (cfg.crop_pct, cfg.interpolation, cfg.mean) == (0.875, "bicubic", (0.485, 0.456, 0.406))
    assert is_model_pretrained("toy_small")
    assert not is_model_pretrained("toy_base")
    assert get_pretrained_cfg("toy_base").input_size == (3, 64, 64)


@pytest.mark.parametrize("way", ["overlay", "checkpoint_path", "state_dict"])
def test_a_published_file(way, source, published):
    """Every way in goes through the key rules."""
    if way == "overlay":
        model = timm.create_model("toy_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(published)})
    elif way == "checkpoint_path":
        model = timm.create_model("toy_tiny", checkpoint_path=published)
    else:
        model = timm.create_model("toy_tiny")
        model.load_state_dict(read_checkpoint(published).state)
    assert torch.equal(model.eval()(X), source(X))


def test_downloaded_weights(source, published, monkeypatch, tmp_path):
    """``pretrained=True`` fetches the url into ``cache_dir``; a hub id with a file name goes the same way."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: published.rename(path))
    deeper = timm.create_model("toy_small").eval()
    write_checkpoint(to_published(deeper.state_dict(), KEYS), published)
    model = timm.create_model("toy_small", pretrained=True, cache_dir=tmp_path / "cache")
    assert torch.equal(model.eval()(X), deeper(X))
    assert (tmp_path / "cache" / "toy_small.pth").is_file()

    write_checkpoint(source.state_dict(), tmp_path / "cache" / "toy_tiny.safetensors")
    model = timm.create_model("toy_tiny.in10", pretrained=True, cache_dir=tmp_path / "cache")
    assert torch.equal(model.eval()(X), source(X))


def test_a_download_that_fails(monkeypatch, tmp_path):
    """The error reaches the caller of timm whole."""

    def unreachable(url, path, progress):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(DownloadError, match=r"save it as .*toy_small\.pth, or pass checkpoint_path"):
        timm.create_model("toy_small", pretrained=True, cache_dir=tmp_path)


def test_no_weights():
    """A row without a file says so."""
    with pytest.raises(ValueError, match="toy_base has no published weights"):
        timm.create_model("toy_base", pretrained=True)


def test_a_wrong_file_is_an_error(published):
    """timm alone would have loaded what fits as soon as the class count differs."""
    with pytest.raises(ValueError, match="it looks like toy_tiny"):
        timm.create_model(
            "toy_small", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": str(published)}
        )


def test_only_what_the_caller_asked_for_is_adapted(source, published, tmp_path):
    """Other classes, channels and size at once; but a file with an undeclared head is an error."""
    overlay = {"file": str(published)}
    model = timm.create_model(
        "toy_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1, img_size=32
    )
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    torch.testing.assert_close(model.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    headless = timm.create_model("toy_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert headless(X).shape == (2, 4)

    odd = timm.create_model("toy_tiny", num_classes=12)
    write_checkpoint(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"is \(12, 4\) in the file, \(10, 4\) in the model"):
        timm.create_model("toy_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "odd.pth")})


@pytest.mark.parametrize("feature_cls", [None, "list"])
def test_features_only(feature_cls, source, published):
    """Maps with the weights of the file; channels and strides are those of feature_info."""
    arguments = {"feature_cls": feature_cls} if feature_cls else {}
    model = timm.create_model(
        "toy_tiny", features_only=True, out_indices=(0, 2), pretrained=True,
        pretrained_cfg_overlay={"file": str(published)}, **arguments,
    ).eval()  # fmt: skip
    maps = model(X)
    expected = source.forward_intermediates(X, indices=(0, 2), intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert [each.shape[1] for each in maps] == model.feature_info.channels()
    assert [64 // each.shape[2] for each in maps] == model.feature_info.reduction()
    assert len(timm.create_model("toy_tiny", features_only=True)(X)) == 4


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_save_for_hf_and_local_dir(tmp_path, safe):
    """A folder gives back the weights and the arguments."""
    model = timm.create_model("toy_tiny", num_classes=7, in_chans=1, img_size=32, scan="hilbert").eval()
    save_for_hf(model, tmp_path, safe_serialization=safe)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(back(x), model(x))
    assert back.scan == "hilbert"
    three = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert torch.equal(three.stem.conv.weight, model.stem.conv.weight)


def test_an_empty_folder(tmp_path):
    """The error names what is looked for."""
    model = timm.create_model("toy_tiny")
    save_for_hf(model, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_the_sha256_of_the_row_is_checked(monkeypatch, tmp_path):
    """What timm passes back is recognised as the row's own weights."""
    weights = replace(WEIGHTS, sha256="0" * 64)
    register([replace(VARIANTS[1], name="toy_checked", weights={"in10": weights})])
    (tmp_path / "toy_small.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
        timm.create_model("toy_checked", pretrained=True, cache_dir=tmp_path)
