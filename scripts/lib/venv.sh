# Sourced by the other scripts: makes .venv in the repository's root, on a bare machine too, and activates it.
# Usage: . scripts/lib/venv.sh; use_venv requirements-training.txt [EXTRA ...]; or, for the tests, use_test_venv

use_venv() {
  local requirements=$1 python=${PYTHON:-python3} stamp wanted
  shift
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $($python --version)"
    if ! $python -c 'import ensurepip' 2>/dev/null || ! $python -m venv .venv; then
      # Debian's python3 comes without ensurepip: virtualenv brings a pip of its own.
      rm -rf .venv
      $python -m pip install --quiet --target .cache/virtualenv virtualenv
      PYTHONPATH=.cache/virtualenv $python -m virtualenv --quiet .venv
    fi
  fi
  . .venv/bin/activate
  stamp=.venv/.installed
  wanted=$(cat "$requirements" pyproject.toml; printf '%s\n' "$@"; pwd)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $requirements $* (PyTorch is large: this takes minutes the first time)"
    python -m pip install -r "$requirements" "$@"
    python -m pip install --quiet --no-deps -e .
    printf '%s\n' "$wanted" >"$stamp"
  fi
}

use_test_venv() { # the extra [test] of pyproject.toml
  use_venv requirements-training.txt 'pytest>=8.0' 'pytest-xdist>=3.7' 'ruff>=0.6' 'hypothesis>=6.100' 'mypy>=1.11' \
    'pandas>=2.0' 'pyarrow>=15.0' 'scikit-learn>=1.2' 'resvg-py>=0.5'
}
