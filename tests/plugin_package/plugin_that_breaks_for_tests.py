"""A plug-in that cannot be imported here."""

raise OSError("libkernel.so: cannot open shared object file")
