"""The command ``heedful``."""
