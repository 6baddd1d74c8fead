"""Vision and medical-imaging state-space models: one scan, any scan order, at home in timm.

``import vssm`` registers every model with timm. Nothing heavier than timm is imported.
"""

import warnings

from vssm._layout import ensure_checkout_packages

ensure_checkout_packages()

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "create_detector", "create_model", "list_models", "load_weights"]

try:
    import timm  # noqa: F401
except Exception as _error:  # a torchvision of another torch raises RuntimeError, a missing one ImportError
    _broken: Exception | None = _error
    warnings.warn(
        f"vssm: timm cannot be imported ({type(_error).__name__}: {_error}), so there are no models; "
        "`vssm doctor` (python -m vssm doctor) says what mends it",
        stacklevel=2,
    )
else:
    _broken = None
    from vssm.checkpoints import load_weights
    from vssm.models.variant import variants
    from vssm.registries.timm import register
    from vssm.registries.torchvision import create_detector
    from vssm.registries.zoo import create_model, list_models

    register(variants().values())
    del register, variants


def __getattr__(name: str) -> object:
    if _broken is not None and name in __all__:
        raise ImportError(f"vssm.{name} needs timm, which cannot be imported; `vssm doctor` says why") from _broken
    raise AttributeError(f"module 'vssm' has no attribute {name!r}")
