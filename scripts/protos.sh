#!/usr/bin/env bash
# Generates the stubs of protos/shelora/v1 into shelora/v1 (import path shelora.v1.*), types included.
#   scripts/protos.sh           rewrite shelora/v1
#   scripts/protos.sh --check   change nothing; fail when shelora/v1 is not what the protos give
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
out=shelora/v1

case "${1-}" in
  "") check=no ;;
  --check) check=yes ;;
  *) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;;
esac

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

"$bin/python" -m grpc_tools.protoc -Iprotos \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --python_out="$fresh" --grpc_python_out="$fresh" --mypy_out=quiet:"$fresh" --mypy_grpc_out=quiet:"$fresh" \
  protos/shelora/v1/*.proto
cat >"$fresh/shelora/v1/__init__.py" <<'END'
"""Messages and stubs generated from protos/shelora/v1 by `make protos`; never edited by hand."""
END

if [[ $check == yes ]]; then
  if ! diff -rq --exclude=__pycache__ "$fresh/shelora/v1" "$out" >&2; then
    echo "protos: $out is not what protos/shelora/v1 gives: run 'make protos' and commit the result" >&2
    exit 1
  fi
  echo "protos: $out is current"
else
  mkdir -p "$out"
  cp "$fresh/shelora/v1/"* "$out/"
  for file in "$out"/*.*; do
    [[ -e $fresh/$file ]] || rm "$file"
  done
  echo "protos: wrote $(find "$out" -maxdepth 1 -type f | wc -l) files to $out"
fi
