"""``python -m heedful``: the command, where it is not on the path, as in an embedded Python."""

from heedful.cli import main

if __name__ == "__main__":
    main()
