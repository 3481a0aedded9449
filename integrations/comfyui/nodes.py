"""The nodes. All that they compute is heedful's; here are their sockets, and what they say where heedful is not there.

heedful is imported when a node needs it, so that ComfyUI starts as fast without it, and as well.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_log = logging.getLogger("heedful")
CATEGORY = "heedful"
FALLBACKS = ["warn", "strict", "silent"]
# What the node offers while heedful is not there, so that a saved graph still loads and its nodes can say so.
NAMES = [
    "auto", "aiter", "flash", "flash_3", "flash_4", "flex", "native", "native_cudnn", "native_efficient",
    "native_flash", "native_math", "reference", "sage", "xformers", "keep", "disabled",
]  # fmt: skip
INSTALLER = Path(__file__).resolve().parent / "install.py"


class Missing(RuntimeError):
    """heedful cannot be imported; the text says what to do."""


def adapter() -> ModuleType:
    """heedful's side of the nodes. Raises Missing."""
    try:
        return importlib.import_module("heedful.integrations.comfyui")
    except ImportError as error:
        command = f'"{sys.executable}" "{INSTALLER}"'
        raise Missing(f"heedful cannot be used ({error}). Install it with: {command}, then restart ComfyUI.") from error


def doctor_text() -> str:
    """What this machine can run, and why not the rest: heedful's doctor, or its table of backends where it has none."""
    try:
        doctor = importlib.import_module("heedful.doctor")
    except ModuleNotFoundError:  # heedful 0.1.0 before its doctor
        return str(importlib.import_module("heedful").list_backends())
    return str(doctor.examine())


def shown(text: str, *results: Any) -> dict[str, Any]:
    """A node's result, with its text for the interface and in ComfyUI's log."""
    _log.info("%s", text)
    return {"ui": {"text": [text]}, "result": (*results, text)}


class AttentionBackend:
    """A model whose attention is computed by one of heedful's backends. The model that came in stays as it is."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Computes the diffusion model's attention by the chosen backend. CLIP and VAE are not covered."
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        try:
            names = adapter().backend_names()
        except Missing:
            names = NAMES
        rules = "Lines such as: *.cross = native   or: model.input.* = flash, native. The first that matches decides."
        return {
            "required": {
                "model": ("MODEL",),
                "backend": (names, {"default": "auto", "tooltip": "disabled takes heedful's override away"}),
                "fallback": (
                    FALLBACKS,
                    {"default": "warn", "tooltip": "For calls that the backend cannot compute: strict raises."},
                ),
            },
            "optional": {"rules": ("STRING", {"default": "", "multiline": True, "tooltip": rules})},
        }

    def apply(self, model: Any, backend: str, fallback: str, rules: str = "") -> tuple[Any, str]:
        """The model, and what holds for it. Raises Missing with the fallback "strict"."""
        try:
            found = adapter()
        except Missing as error:
            if fallback == "strict":
                raise
            _log.warning("%s", error)
            return model, f"The model is unchanged: {error}"
        model, text = found.with_override(model, backend, fallback, rules)
        _log.info("%s", text)
        return model, text


class AttentionDoctor:
    """What this machine can run, and why not the rest."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Every backend on this machine, with the reason where it cannot run."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "examine"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")  # what is installed may have changed

    def examine(self) -> dict[str, Any]:
        """The report."""
        try:
            adapter()
        except Missing as error:
            return shown(str(error))
        return shown(doctor_text())


class AttentionReport:
    """What ran in a model. The latent makes it wait for the sampler and passes through."""

    CATEGORY = CATEGORY
    DESCRIPTION = "What computed the model's attention so far. Put it behind the sampler."
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "tell"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def tell(self, model: Any, latent: Any) -> dict[str, Any]:
        """The latent and the report."""
        try:
            return shown(adapter().override_report(model), latent)
        except Missing as error:
            return shown(str(error), latent)


NODE_CLASS_MAPPINGS = {
    "HeedfulAttentionBackend": AttentionBackend,
    "HeedfulAttentionDoctor": AttentionDoctor,
    "HeedfulAttentionReport": AttentionReport,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HeedfulAttentionBackend": "Attention Backend",
    "HeedfulAttentionDoctor": "Attention Doctor",
    "HeedfulAttentionReport": "Attention Report",
}
