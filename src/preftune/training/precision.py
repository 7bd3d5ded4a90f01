"""The precision of passes: what a setting means on this machine. Weights are float32 in any."""

import os
from typing import Literal

import torch

from preftune.errors import ConfigError

Precision = Literal["float32", "bf16", "fp16"]
Asked = Literal["auto", "float32", "bf16", "fp16"]
MIXED = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's words
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def effective_precision(precision: Asked) -> Precision:
    """`auto` is bf16 where that pays, else float32; fp16 needs a GPU and is float32 on a CPU."""
    if precision == "auto":
        return "bf16" if multiplies_bf16() else "float32"
    return "float32" if precision == "fp16" and not (_has_gpu() and torch.cuda.is_available()) else precision


def multiplies_bf16() -> bool:
    """Whether the GPU, or the processor where there is none, has instructions for products in bfloat16. Torch
    computes them everywhere; emulated they are slower than float32, on a processor with AVX2 about ten times.
    False on GPUs that are not CUDA's, where nobody has measured it.
    """
    if _has_gpu():
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()  # get_capabilities is newer than torch 2.10


def refuse_emulation(device: torch.device, precision: Precision) -> None:
    """ConfigError for bfloat16 on a GPU that only emulates it, which torch calls support."""
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            "precision bf16 needs a GPU of compute capability 8.0; this one only emulates it",
            hint="use precision=fp16 or precision=float32",
        )


def remark(setting: Asked, precision: Precision) -> str | None:
    """What to tell a user who asked for one precision and gets another one, or a slow one."""
    slow = precision == "bf16" and not multiplies_bf16() and not _has_gpu()
    emulated = (
        "; this processor only emulates bf16, which is several times slower than float32" if slow else ""
    )
    if setting == "auto":
        began = "" if precision == effective_precision(setting) else ", with which the run began"
        return f"precision auto: {precision}{began}{emulated}"
    if effective_precision(setting) != setting:
        return f"precision {setting} needs a GPU; this run uses {effective_precision(setting)}"
    return f"precision {setting}{emulated}" if slow else None


def _has_gpu() -> bool:
    """Whether accelerate takes one: it is there, and ACCELERATE_USE_CPU does not say otherwise."""
    allowed = os.environ.get("ACCELERATE_USE_CPU", "").lower() not in {"1", "true", "t", "yes", "y", "on"}
    return allowed and torch.accelerator.is_available()
