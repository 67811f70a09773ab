#!/bin/sh
# As a stranger would: build the wheel, install it in an empty environment with what it declares, run the command. Then,
# with an older Python, the quick part of the tests. Everything goes into a temporary folder. `make stranger`.
set -eu
cd "$(dirname "$0")/.."
OLDER=${OLDER:-3.12}
say() { printf 'stranger: %s\n' "$*" >&2; }

uv=$(command -v uv || true)
[ -n "$uv" ] || uv=.venv-tools/bin/uv
[ -x "$uv" ] || { say "no uv: run scripts/setup.sh first"; exit 1; }
case $uv in /*) ;; *) uv=$(pwd -P)/$uv ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# uv does not read pip's settings.
index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi

"$uv" build --quiet --wheel --build-constraint constraints.txt --out-dir "$work" .
wheel=$(ls "$work"/*.whl)
say "built $(basename "$wheel")"

# The versions are those of constraints.txt; which packages come is up to the wheel.
"$uv" venv --quiet --python "$(pwd -P)/.venv/bin/python" "$work/env"
"$uv" pip install --quiet --python "$work/env/bin/python" --constraint constraints.txt "$wheel"
for name in beartype pytest ruff sphinx; do
    if "$work/env/bin/python" -c "import $name" 2>/dev/null; then say "the wheel brings $name"; exit 1; fi
done
(
    cd "$work"
    JAX_PLATFORMS=cpu env/bin/pssm --help >/dev/null
    JAX_PLATFORMS=cpu env/bin/pssm compare nile --out nile --quiet --methods nuts,svi:normal \
        --warmup 200 --samples 200 --chains 2 --steps 500 --horizon 5
    test -s nile/report.html
)
say "pssm compare nile: runs from the wheel"

# The older Python, of this machine alone: nothing is downloaded.
python=
for candidate in "$(command -v "python$OLDER" || true)" "${PYENV_ROOT:-${HOME:-/}/.pyenv}/versions/$OLDER".*/bin/python; do
    # A pyenv shim may stand for a version that is not there.
    if [ -z "$python" ] && "$candidate" -c 'import sys, venv' >/dev/null 2>&1; then python=$candidate; fi
done
if [ -z "$python" ]; then
    echo "not run: the tests with Python $OLDER, which is not on this machine"
    exit 0
fi
"$uv" venv --quiet --python "$python" "$work/older"
"$uv" pip install --quiet --python "$work/older/bin/python" --constraint constraints.txt "$wheel" --group test
JAX_PLATFORMS=cpu "$work/older/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist loadfile -m "not slow" \
    $(sed -e '/^#/d' -e 's|^|tests/|' tests/older_python.txt)
say "tests with $("$work/older/bin/python" --version): passed"
