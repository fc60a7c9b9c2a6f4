#!/usr/bin/env bash
# Makes .venv ready for work: a usable Python, the locked packages of requirements/dev.txt, the project itself.
#   scripts/setup.sh                 set up; a second run with nothing changed returns at once
#   scripts/setup.sh --find-python   only print the interpreter that would be used
# SHELORA_PYTHON=/path/to/python names the interpreter and skips the search.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/shelora-setup.stamp

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

# --- the interpreter --------------------------------------------------------------------------------------------------

# OpenFHE ships one binary for CPython 3.10 (glibc 2.34 or later) and one for CPython 3.12 (glibc 2.38 or later), and no
# other. A file on PATH proves nothing (a pyenv shim may refuse to run), so every candidate has to answer.
accepts() { # accepts INTERPRETER VERSION: prints the real path of a usable interpreter of that version
  "$1" -I - "$2" 2>/dev/null <<'END'
import os, platform, struct, sys

wanted = tuple(int(part) for part in sys.argv[1].split("."))
glibc_needed = {(3, 10): (2, 34), (3, 12): (2, 38)}[wanted]
name, version = platform.libc_ver()
glibc = tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (0, 0)
usable = (
    sys.version_info[:2] == wanted
    and sys.implementation.name == "cpython"
    and struct.calcsize("P") == 8
    and glibc >= glibc_needed
)
if not usable:
    sys.exit(1)
import ensurepip, sqlite3, ssl, venv  # noqa: E401,F401 (a build or a distribution may lack any of them)

print(os.path.realpath(sys.executable))
END
}

find_python() {
  local candidate found version
  if [[ -n ${SHELORA_PYTHON-} ]]; then
    for version in 3.12 3.10; do
      accepts "$SHELORA_PYTHON" "$version" && return 0
    done
    return 1
  fi
  shopt -s nullglob
  for version in 3.12 3.10; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python; do
      command -v "$candidate" >/dev/null || continue
      accepts "$candidate" "$version" && return 0
    done
  done
  if command -v uv >/dev/null; then
    for version in 3.12 3.10; do
      found=$(uv python find --no-project --no-python-downloads "$version" 2>/dev/null) || continue
      accepts "$found" "$version" && return 0
    done
  fi
  return 1
}

explain_no_python() {
  local reason="found no usable Python"
  [[ -z ${SHELORA_PYTHON-} ]] || reason="SHELORA_PYTHON=$SHELORA_PYTHON is not usable"
  fail "$reason: needs 64-bit CPython 3.10 with glibc >= 2.34, or CPython 3.12 with glibc >= 2.38," \
    "with the modules venv, ensurepip, ssl and sqlite3. This machine has $(getconf GNU_LIBC_VERSION 2>/dev/null || echo 'no glibc')." \
    "Any one of these gives you one:" \
    "  Ubuntu 24.04:  sudo apt-get install python3.12 python3.12-venv" \
    "  Ubuntu 22.04:  sudo apt-get install python3.10 python3.10-venv" \
    "  uv:            uv python install 3.10" \
    "  pyenv:         pyenv install 3.10   (found under ~/.pyenv/versions, no need to activate it)" \
    "then run this again, or name an interpreter: SHELORA_PYTHON=/path/to/python3.10 make setup"
}

check_platform() {
  local system machine
  system=$(uname -s) machine=$(uname -m)
  [[ $system == Linux && $machine == x86_64 ]] && return
  fail "this is $system on $machine; OpenFHE's Python wheels exist for Linux on x86_64 only." \
    "On macOS or Windows work in a Linux x86_64 virtual machine, container or WSL 2."
}

# --- the environment --------------------------------------------------------------------------------------------------

fingerprint() {
  cat requirements/bootstrap.txt requirements/dev.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1
}

is_current() {
  [[ -f $stamp && $(<"$stamp") == "$(pwd -P) $(fingerprint)" ]] && "$venv/bin/python" -c '' 2>/dev/null
}

make_venv() {
  local python version
  if [[ -f $stamp && $(<"$stamp") != "$(pwd -P) "* ]]; then
    fail "$venv was made in another folder and its programs still point there. Remove it (rm -rf $venv) and run this again."
  fi
  if [[ -x $venv/bin/python ]]; then
    for version in 3.12 3.10; do
      if accepts "$venv/bin/python" "$version" >/dev/null; then
        say "using the existing $venv (Python $version)"
        return
      fi
    done
    fail "$venv exists, but its Python is neither a working 3.10 nor a 3.12 that OpenFHE supports here." \
      "Remove it (rm -rf $venv) and run this again."
  fi
  python=$(find_python) || explain_no_python
  say "Python $("$python" -c 'import platform; print(platform.python_version())') at $python"
  "$python" -m venv "$venv"
}

install_uv() {
  local wanted
  wanted=$(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements/bootstrap.txt)
  if [[ -x $venv/bin/uv && $("$venv/bin/uv" --version) == "uv $wanted"* ]]; then
    return
  fi
  say "installing uv $wanted"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
}

install_packages() {
  local verbosity=(--quiet) cache
  [[ ! -t 2 ]] || verbosity=()
  # Hard links need the cache on the same file system; elsewhere say "copy" rather than let uv warn and fall back.
  cache=$("$venv/bin/uv" cache dir)
  mkdir -p "$cache"
  if [[ -z ${UV_LINK_MODE-} && $(stat -c %d "$cache") != "$(stat -c %d "$venv")" ]]; then
    export UV_LINK_MODE=copy
  fi
  say "installing $(grep -c '==' requirements/dev.txt) locked packages (about 3 GB to fetch the first time)"
  "$venv/bin/uv" pip install "${verbosity[@]}" --python "$venv/bin/python" --require-hashes -r requirements/dev.txt
  "$venv/bin/uv" pip install "${verbosity[@]}" --python "$venv/bin/python" --no-deps --editable .
}

main() {
  local started=$SECONDS
  check_platform
  case "${1-}" in
    "") ;;
    --find-python) find_python || explain_no_python; return ;;
    *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
  esac
  if is_current; then
    return
  fi
  make_venv
  # A stamp from before must not outlive a run that fails half-way.
  rm -f "$stamp"
  install_uv
  install_packages
  printf '%s %s' "$(pwd -P)" "$(fingerprint)" >"$stamp"
  say "ready in $((SECONDS - started)) s: $venv"
}

main "$@"
