#!/usr/bin/env bash
# Prints the path of a Python 3.12 that works: from PATH, or from pyenv's versions.
set -u
for candidate in python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    # A pyenv shim exists even where its version is not selected: only running it tells.
    if "$path" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        echo "$path"
        exit 0
    fi
done
echo "No Python 3.12 found (looked at python3.12 and python3 on PATH, and in pyenv): install it, for example with" \
    "'pyenv install 3.12' or 'apt-get install python3.12-venv', and run make again." >&2
exit 1
