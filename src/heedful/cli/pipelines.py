"""Somebody's own diffusers pipeline, from a folder or the Hub's cache; from the Hub itself only by a pinned commit."""

from __future__ import annotations

from typing import Any

import torch
import typer


def load_pipeline(model: str, revision: str | None, device: str, option: str = "--model") -> Any:
    """The pipeline on a device, in float32 on a CPU, else float16. Raises BadParameter, naming the option."""
    from diffusers import DiffusionPipeline

    dtype = torch.float32 if device == "cpu" else torch.float16
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            model, revision=revision, local_files_only=revision is None, use_safetensors=True, **{_dtype_word(): dtype}
        ).to(device)
    except (OSError, ValueError) as error:  # the latter for what cannot be a Hub id
        remedy = (
            ""
            if revision
            else f"; a model that is not cached is downloaded only when pinned: --revision COMMIT ({model})"
        )
        raise typer.BadParameter(f"{option}: {error}{remedy}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dtype_word() -> str:
    """diffusers renamed ``torch_dtype`` and warns of the old name; retired with the last version that lacks the new."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
