#!/bin/sh
# Installs heedful, if need be, and the attention backend that fits this machine. Asks nothing.
#
#   ./install.sh                 the best backend for this GPU
#   ./install.sh sage            one by name; all options of `heedful install` work, such as --dry-run
#   PYTHON=/path/to/python ./install.sh
#
# torch is never replaced: it has to be there first.
set -eu

python="${PYTHON:-}"
for name in python3 python; do
    if [ -z "$python" ] && command -v "$name" > /dev/null 2>&1; then
        python="$name"
    fi
done
if [ -z "$python" ]; then
    echo "There is no Python here. Install Python 3.10 or newer, or name one: PYTHON=/path/to/python ./install.sh" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' < /dev/null; then
    echo "heedful needs Python 3.10 or newer, '$python' is older. Name another: PYTHON=/path/to/python ./install.sh" >&2
    exit 1
fi
if ! "$python" -c 'import torch' < /dev/null > /dev/null 2>&1; then
    echo "'$python' has no torch that can be imported. Install it first, as https://pytorch.org/get-started says for" >&2
    echo "your GPU: heedful never picks a torch for you. Then run this again." >&2
    exit 1
fi
if ! "$python" -c 'import heedful' < /dev/null > /dev/null 2>&1; then
    here="$(CDPATH= cd -- "$(dirname -- "$0")" > /dev/null && pwd)"
    if [ ! -f "$here/pyproject.toml" ]; then
        echo "heedful is installed from its own repository, and this is not in one: clone it, and run its install.sh." >&2
        exit 1
    fi
    echo "Installing heedful; torch stays as it is."
    pins="$(mktemp)"
    "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' < /dev/null > "$pins"
    if ! "$python" -m pip install --no-input -c "$pins" "$here" < /dev/null; then
        rm -f "$pins"
        echo "heedful could not be installed: pip's last lines above say why. Nothing else was changed." >&2
        exit 1
    fi
    rm -f "$pins"
fi
exec "$python" -m heedful install "$@" < /dev/null
