"""Which quantised checkpoints are read: asked when a model is planned, and again when its weights are opened."""

from __future__ import annotations

from collections.abc import Mapping

from flexrun.errors import UnsupportedError


def check_quantization(settings: Mapping) -> str:
    """The method of a ``quantization_config`` that is read (fp8 or mxfp4); UnsupportedError names any other."""
    method = settings.get("quant_method")
    what = None
    if method not in ("fp8", "mxfp4"):
        what = f"quant_method {method!r}"
    elif method == "fp8":
        block = settings.get("weight_block_size")
        if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(_is_size(size) for size in block)):
            what = f"quant_method 'fp8' with weight_block_size {block!r}"
        elif settings.get("fmt") not in (None, "e4m3"):
            what = f"quant_method 'fp8' with fmt {settings['fmt']!r}"
        elif settings.get("activation_scheme") not in (None, "dynamic"):
            what = f"quant_method 'fp8' with activation_scheme {settings['activation_scheme']!r}"
    if what is not None:
        raise UnsupportedError(
            f"config option quantization_config ({what})",
            "FP8 (e4m3 with a factor for each block of weights) and MXFP4 are read; convert others to bfloat16 first",
        )
    return method


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
