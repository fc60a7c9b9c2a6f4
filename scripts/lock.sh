#!/usr/bin/env bash
# Rewrites requirements/*.txt from the extras of pyproject.toml: every version pinned, every file hashed, one set of
# versions for Python 3.10 and 3.12 and for all roles. Pins that still fit are kept; `scripts/lock.sh --upgrade` moves them.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}

# uv repeats the platform of [tool.uv] environments on every line. There it would make an installer elsewhere skip all lines
# in silence, where a "no matching wheel" is the better answer; what is left tells Python 3.10 and 3.12 apart.
platform_markers=(
  -e "/^[a-zA-Z0-9]/s/ and \(sys_platform == 'linux'\|platform_machine == 'x86_64'\)//g"
  -e "/^[a-zA-Z0-9]/s/ and \(implementation_name == 'cpython'\|platform_python_implementation == 'CPython'\)//g"
  -e "/^[a-zA-Z0-9]/s/ and \(implementation_name\|platform_python_implementation\) != 'PyPy'//g"
  -e "/^[a-zA-Z0-9]/s/ ; python_full_version < '3.13' \\\\$/ \\\\/"
)

lock() { # lock NAME SOURCE-DESCRIPTION ARGUMENTS...
  local name=$1 source=$2 output
  shift 2
  output=requirements/$name.txt
  "$uv" pip compile --quiet --universal --python-version 3.10 --fork-strategy fewest --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file "$output" "$@" >/dev/null
  sed -i "${platform_markers[@]}" -e '/^#/d' -e "1i # Locked from $source by scripts/lock.sh; do not edit." "$output"
  echo "$output: $(grep -c '==' "$output") pins"
}

lock dev "the extra 'dev' of pyproject.toml" --extra dev pyproject.toml "$@"
for role in aggregator keymanager agent; do
  lock "$role" "the extra '$role' of pyproject.toml" --extra "$role" --constraint requirements/dev.txt pyproject.toml
done
# What installs everything else, and the build backend of pyproject.toml in the same version.
printf 'uv\nuv-build\n' | lock bootstrap "the pin of uv in requirements/dev.txt" --constraint requirements/dev.txt -
