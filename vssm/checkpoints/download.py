"""Fetch published weights once, into the cache that torch.hub and timm use, and know them again by their SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

from torch import hub

from vssm.models.variant import Weights

_logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """Weights could not be fetched; the message says what to fetch by hand and where to put it."""


def locate(weights: Weights, cache_dir: str | Path | None = None) -> Path:
    """The file of ``weights`` on this machine, fetched if it is not there yet.

    A known SHA-256 is checked. An unknown one is written beside the file (``NAME.sha256``) when it is first seen, and
    checked from then on.

    Raises:
        DownloadError: If the file cannot be fetched.
        ValueError: If its SHA-256 is not the expected one.
    """
    if weights.file:
        path = Path(weights.file)
        if not path.is_file():
            raise FileNotFoundError(f"load_weights: no file {path}")
        if weights.sha256:
            _check(path, weights.sha256, "fetch it again")
        return path
    cached = cached_path(weights, cache_dir)
    path = cached if cached.is_file() else _fetched(weights, cached, cache_dir)
    record = cached.with_name(cached.name + ".sha256")
    if weights.sha256:
        _check(path, weights.sha256, "fetch it again")
    elif record.is_file():
        _check(path, record.read_text().split()[0], f"fetch it again, or remove {record} if it was published anew")
    else:
        _record(path, record)
    return path


def cached_path(weights: Weights, cache_dir: str | Path | None = None) -> Path:
    """Where a file fetched by hand is found: ``cache_dir`` or torch.hub's checkpoints, under its published name."""
    folder = Path(cache_dir) if cache_dir else Path(hub.get_dir(), "checkpoints")
    return folder / (weights.hf_hub_filename or Path(urlparse(weights.url or "").path).name)


def source_url(weights: Weights) -> str:
    """The address to fetch by hand."""
    if weights.url:
        return weights.url
    from huggingface_hub import hf_hub_url  # only for weights that lie there

    name, _, revision = (weights.hf_hub_id or "").partition("@")
    return hf_hub_url(name, weights.hf_hub_filename or "", revision=revision or None)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetched(weights: Weights, path: Path, cache_dir: str | Path | None) -> Path:
    try:
        if weights.url:
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(weights.url, str(path), progress=sys.stderr.isatty())
            return path
        from huggingface_hub import hf_hub_download

        name, _, revision = (weights.hf_hub_id or "").partition("@")
        file = weights.hf_hub_filename or ""
        return Path(hf_hub_download(name, file, revision=revision or None, cache_dir=cache_dir))
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"load_weights: could not fetch {source_url(weights)} ({type(error).__name__}: {_brief(error)}); "
            f"fetch it by hand and save it as {path}, or pass checkpoint_path=FILE"
        ) from error


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _check(path: Path, expected: str, mend: str) -> None:
    found = sha256(path)
    if found != expected.lower():
        raise ValueError(f"load_weights: {path} has SHA-256 {found}, expected {expected}; {mend}")


def _record(path: Path, record: Path) -> None:
    digest = sha256(path)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        part = record.with_name(f"{record.name}.{os.getpid()}")     # other processes may be reading or writing it
        part.write_text(f"{digest}  {path.name}\n")
        os.replace(part, record)
    except OSError as error:                                 # a folder shared read-only
        _logger.warning("first use of %s, SHA-256 %s, which could not be recorded: %s", path, digest, error)
    else:
        _logger.info("first use of %s: SHA-256 %s, recorded in %s", path, digest, record)
