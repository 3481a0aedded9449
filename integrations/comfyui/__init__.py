"""heedful's nodes for ComfyUI: Attention Backend, Attention Doctor, Attention Report. They load without heedful."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
