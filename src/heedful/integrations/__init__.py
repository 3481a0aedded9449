"""Other libraries' names, translated: which of their modules compute attention, and which are out of reach, and why.

Each module has ``attention_layer(module)``, which ``models`` asks; none is imported before its library is.
"""
