#!/bin/sh
# Make .venv: pssm (editable) with all dependency groups, at the versions of constraints.txt.
# Uses uv: from PATH, or a private copy in .venv-tools; without uv, plain venv and pip. Running it again repairs.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv
TOOLS=.venv-tools
AT_LEAST_3_12='import sys; sys.exit(sys.version_info < (3, 12))'
say() { printf 'setup: %s\n' "$*" >&2; }

# The Pythons of this machine, one a line, best first. (A pyenv shim may stand for a version that is not there.)
pythons() {
    for name in python3.13 python3 python3.14 python3.12 python; do command -v "$name" || true; done
    ls /usr/bin/python3 /usr/local/bin/python3 /opt/homebrew/bin/python3 2>/dev/null || true
    ls "${PYENV_ROOT:-${HOME:-/}/.pyenv}"/versions/*/bin/python3 2>/dev/null || true
}

# The first Python that runs the statements "$1" without error.
python_that_runs() {
    pythons | while read -r python; do
        if "$python" -c "$1" </dev/null >/dev/null 2>&1; then echo "$python"; break; fi
    done
}

# A uv that knows dependency groups. Never fails: prints nothing where there is none and none can be had.
find_uv() {
    for uv in "$(command -v uv || true)" "$TOOLS/bin/uv"; do
        if [ -n "$uv" ] && "$uv" pip install --help 2>/dev/null | grep -q -e --group; then echo "$uv"; return; fi
    done
    python=$(python_that_runs 'import venv, ensurepip')
    [ -n "$python" ] || return 0
    say "no uv here: installing a private one in $TOOLS"
    rm -rf "$TOOLS"
    if "$python" -m venv "$TOOLS" >&2 && "$TOOLS/bin/python" -m pip install --quiet 'uv>=0.8' >&2; then
        echo "$TOOLS/bin/uv"
    else
        say "could not install uv; going on with plain venv and pip"
    fi
}

# uv does not read pip's settings: hand over the index and the certificates where they are set.
share_pip_settings() {
    python=$(python_that_runs 'import pip')
    index=${PIP_INDEX_URL:-}
    if [ -z "$index" ] && [ -n "$python" ]; then
        index=$("$python" -m pip config get global.index-url 2>/dev/null || true)
    fi
    if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
    if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
}

# Python 3.13, else any from 3.12, of this machine; only then download one.
make_venv_with_uv() {
    UV_PYTHON_DOWNLOADS=never "$1" venv --quiet --python 3.13 "$VENV" 2>/dev/null ||
        UV_PYTHON_DOWNLOADS=never "$1" venv --quiet --python '>=3.12' "$VENV" 2>/dev/null ||
        "$1" venv --quiet --python 3.13 "$VENV"
}

install_with_uv() {
    uv=$(find_uv)
    [ -n "$uv" ] || return 1
    share_pip_settings
    [ -d "$VENV" ] || make_venv_with_uv "$uv" || return 1
    "$uv" pip install --python "$VENV/bin/python" --constraint constraints.txt --build-constraint constraints.txt \
        --editable . --group dev
}

install_with_pip() {
    if [ ! -d "$VENV" ]; then
        python=$(python_that_runs "import venv, ensurepip; $AT_LEAST_3_12")
        [ -n "$python" ] || return 1
        "$python" -m venv "$VENV" || return 1
    fi
    "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 || true # a venv that uv made has no pip
    "$VENV/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' &&
        "$VENV/bin/python" -m pip install --constraint constraints.txt --editable . --group dev
}

# Start afresh where a venv is broken, too old or was made in another folder (its scripts name that folder).
if [ -e "$VENV" ] && { ! "$VENV/bin/python" -c "$AT_LEAST_3_12" 2>/dev/null ||
    { [ -e "$VENV/.stamp" ] && [ "$(cat "$VENV/.stamp")" != "$(pwd -P)" ]; }; }; then
    say "$VENV does not work here: making a new one"
    rm -rf "$VENV"
fi

rm -f "$VENV/.stamp"
if ! install_with_uv && ! install_with_pip; then
    say "could not set up $VENV. It needs Python 3.12 or newer with its venv module (Debian and Ubuntu: apt install"
    say "python3-venv), or uv (https://docs.astral.sh/uv), and a package index that pip can reach. Messages are above."
    exit 1
fi
pwd -P >"$VENV/.stamp"
say "$VENV is ready: $("$VENV/bin/python" --version)"
