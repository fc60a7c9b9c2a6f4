# Sourced by check.sh and test.sh: named steps with their times, all of them run, one verdict at the end.
step_lines=()
step_failures=0

step() { # step NAME COMMAND...
  local name=$1 started=$SECONDS verdict=ok
  shift
  printf '== %s\n' "$name"
  if ! "$@"; then
    verdict=FAILED
    step_failures=$((step_failures + 1))
  fi
  step_lines+=("$(printf '%-28s %-6s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}

steps_report() { # steps_report TITLE: prints the table; fails when a step did
  printf '== %s\n' "$1"
  printf '   %s\n' "${step_lines[@]}"
  ((step_failures == 0))
}
