#!/usr/bin/env bash
# Runs the test suites, cheapest first. Every suite runs even when one before it failed; the exit status says whether all passed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/steps.sh
bin=.venv/bin
results=build/test

rm -rf "$results" build/coverage
mkdir -p "$results" build/coverage

suite() { # suite NAME PYTEST-ARGUMENTS...: a suite without tests is a failed one
  local name=$1
  shift
  "$bin/python" -m pytest --quiet --durations=5 --durations-min=5 --junit-xml="$results/$name.xml" "$@"
}

step "unit and contract" suite unit tests/unit tests/contract -n 2 --cov --cov-report= --cov-fail-under=0
step "coverage of shelora" "$bin/coverage" report
step "service" suite service tests/service -n 2
step "simulation" suite simulation tests/simulation -n 2
step "e2e" suite e2e tests/e2e
step "deploy" suite deploy tests/deploy
steps_report "test" || status=$?
"$bin/python" scripts/totals.py "$results"
exit "${status-0}"
