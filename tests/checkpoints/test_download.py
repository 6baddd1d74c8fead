"""Published weights are fetched once, known again by SHA-256, and a failure says what to do by hand."""

from __future__ import annotations

import hashlib
import os
import urllib.error
from dataclasses import replace

import pytest
import torch
from toy import WEIGHTS

from vssm.checkpoints import DownloadError, cached_path, locate, source_url
from vssm.models.variant import Weights

HUB = Weights(
    license="MIT", origin_url="", paper="", hf_hub_id="toy/toy@main", hf_hub_filename="sub/toy.safetensors"
)


@pytest.fixture
def served(monkeypatch):
    """A server for ``torch.hub``: a list of the addresses that were fetched."""
    fetched = []

    def download(url, path, progress):
        fetched.append(url)
        with open(path, "wb") as file:
            file.write(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return fetched


def test_fetched_once_and_recorded(tmp_path, served):
    """An unknown SHA-256 is written beside the file at its first use."""
    first, second = locate(WEIGHTS, tmp_path), locate(WEIGHTS, tmp_path)
    assert first == second == tmp_path / "toy_small.pth"
    assert served == [WEIGHTS.url]
    assert (tmp_path / "toy_small.pth.sha256").read_text().split()[0] == hashlib.sha256(b"weights").hexdigest()


def test_a_read_only_folder_is_used_all_the_same(tmp_path, served, monkeypatch, caplog):
    """What cannot be recorded is logged."""
    path = locate(WEIGHTS, tmp_path)
    (tmp_path / "toy_small.pth.sha256").unlink()

    def refused(self, text):
        raise PermissionError("read-only")

    monkeypatch.setattr(type(path), "write_text", refused)
    assert locate(WEIGHTS, tmp_path) == path
    assert "could not be recorded: read-only" in caplog.text


@pytest.mark.parametrize("known", [False, True], ids=["recorded", "known"])
def test_another_file_under_the_name_is_an_error(tmp_path, served, known):
    """A file that was replaced is not loaded."""
    weights = replace(WEIGHTS, sha256=hashlib.sha256(b"weights").hexdigest() if known else None)
    path = locate(weights, tmp_path)
    path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected .*; fetch it again"):
        locate(weights, tmp_path)


def test_the_record_appears_whole(tmp_path, served, monkeypatch):
    """Another process that reads it meanwhile finds none, or all of it."""
    seen, replace_ = [], os.replace

    def watched(part, record):
        seen.append((record.exists(), part.read_text()))
        replace_(part, record)

    monkeypatch.setattr(os, "replace", watched)
    locate(WEIGHTS, tmp_path)
    assert seen == [(False, (tmp_path / "toy_small.pth.sha256").read_text())]


def test_a_file_put_there_by_hand_is_taken(tmp_path, served):
    """As the error of a failed download asks for."""
    cached_path(HUB, tmp_path).parent.mkdir()
    for weights in (WEIGHTS, HUB):
        cached_path(weights, tmp_path).write_bytes(b"by hand")
        assert locate(weights, tmp_path).read_bytes() == b"by hand"
    assert not served


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    """The address, the exact path, and the other way."""

    def unreachable(url, path, progress):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(DownloadError) as error:
        locate(WEIGHTS, tmp_path)
    for part in (WEIGHTS.url, "no route to host", str(tmp_path / "toy_small.pth"), "checkpoint_path=FILE"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_hub_download_says_what_to_do(tmp_path, monkeypatch):
    """The same for weights on the hub, whose address has the revision."""
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DownloadError) as error:
        locate(HUB, tmp_path)
    assert "/toy/toy/resolve/main/sub/toy.safetensors" in source_url(HUB)
    for part in (source_url(HUB), str(tmp_path / "sub" / "toy.safetensors"), "checkpoint_path=FILE"):
        assert part in str(error.value)


def test_the_default_folder_is_the_one_of_torch_hub(monkeypatch, tmp_path):
    """timm looks in the same place."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cached_path(WEIGHTS) == tmp_path / "hub" / "checkpoints" / "toy_small.pth"


def test_a_local_file(tmp_path):
    """It is used where it lies, and nothing is written beside it."""
    weights = Weights(license="MIT", origin_url="", paper="", file=str(tmp_path / "x.pth"))
    with pytest.raises(FileNotFoundError):
        locate(weights)
    (tmp_path / "x.pth").write_bytes(b"weights")
    assert locate(weights) == tmp_path / "x.pth"
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_need_a_place():
    """A row without one is a mistake of the family."""
    with pytest.raises(ValueError, match="must say where the weights are"):
        Weights(license="MIT", origin_url="", paper="")
    with pytest.raises(ValueError, match="license must be named"):
        Weights(license="", origin_url="", paper="", file="x.pth")
    with pytest.raises(ValueError, match="hf_hub_filename must name the file"):
        Weights(license="MIT", origin_url="", paper="", hf_hub_id="toy/toy")
