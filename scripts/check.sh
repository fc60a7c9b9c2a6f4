#!/usr/bin/env bash
# Everything that can be said about the tree without running it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/steps.sh
bin=.venv/bin

step "ruff check" "$bin/ruff" check --quiet .
step "ruff format" "$bin/ruff" format --quiet --check .
step "mypy" "$bin/mypy" --no-error-summary
step "import rules" "$bin/lint-imports" --no-logo --cache-dir build/import-linter
step "buf lint" "$bin/buf" lint
step "generated stubs" scripts/protos.sh --check
steps_report "check"
