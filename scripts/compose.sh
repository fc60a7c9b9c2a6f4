#!/usr/bin/env bash
# A federation in containers on this host (deploy/compose/compose.yaml), with whichever Compose is installed.
#   compose.sh build   the three images; PYTHON_IMAGE, TORCH and TORCH_INDEX are passed on to the Dockerfiles
#   compose.sh up      build, make what is missing of passwords and data, start, wait until all is healthy
#   compose.sh demo    up, then a federation of ROUNDS rounds (3) to its end; adapters go to build/compose/adapters
#   compose.sh down    stop and remove the containers; VOLUMES=yes also deletes their state and the secrets
# MONITORING=yes also starts Prometheus and Grafana. COMPOSE_PROJECT_NAME (shelora) tells several apart, COMPOSE_FILE adds own files.
set -euo pipefail
cd "$(dirname "$0")/.."

export COMPOSE_FILE=${COMPOSE_FILE:-deploy/compose/compose.yaml}
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-shelora}
export SHELORA_VERSION=${SHELORA_VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)}
agents=(agent-1 agent-2 agent-3)
dashboard=http://127.0.0.1:${SHELORA_DASHBOARD_PORT:-7480}/

say() { printf 'compose: %s\n' "$*"; }
fail() {
  printf 'compose: %s\n' "$@" >&2
  exit 1
}

compose() {
  local program=(docker-compose) profiles=()
  if docker compose version >/dev/null 2>&1; then
    program=(docker compose)
  fi
  [[ ${MONITORING-} != yes ]] || profiles=(--profile monitoring)
  "${program[@]}" "${profiles[@]}" "$@"
}

operator() { compose run --rm -T operator "$@"; }

check_engine() {
  command -v docker >/dev/null || fail "docker is missing: install Docker Engine and Compose"
  docker info >/dev/null 2>&1 || fail "no Docker Engine answers: start it (systemctl start docker), or join the group docker"
  docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
    fail "Compose is missing: install the package docker-compose-plugin (or docker-compose)"
}

build_image() { # build_image SERVICE DOCKER-ARGUMENTS...
  local image=shelora/$1:$SHELORA_VERSION log started=$SECONDS
  log=$(docker build "${@:2}" -f "deploy/docker/$1.Dockerfile" -t "$image" . 2>&1) || fail "building $image failed:" "$log"
  say "$image built in $((SECONDS - started)) s"
}

build() {
  local arguments=() variable agent
  for variable in PYTHON_IMAGE TORCH TORCH_INDEX; do
    [[ -z ${!variable-} ]] || arguments+=(--build-arg "$variable=${!variable}")
  done
  arguments+=(--build-arg "VERSION=$SHELORA_VERSION" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
  say "building images; the agent's takes minutes the first time, most of it torch"
  build_image agent "${arguments[@]}" &
  agent=$!
  build_image keymanager "${arguments[@]}"
  build_image aggregator "${arguments[@]}"
  wait "$agent"
}

health() { docker inspect --format '{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}}' "$1"; }

wait_healthy() { # wait_healthy SERVICE...: an agent may also have ended already, when its federation is over
  local service state end=$((SECONDS + 300))
  for service in "$@"; do
    until state=$(health "$(compose ps -q "$service" | head -1)" 2>/dev/null) && [[ $state == "running healthy" || $state == exited* ]]; do
      ((SECONDS < end)) || fail "$service is not healthy after 300 s ($state); its log:" "$(compose logs --tail 20 "$service" 2>&1)"
      sleep 1
    done
    say "$service: $state"
  done
}

up() {
  build
  deploy/compose/prepare.sh "${agents[@]}"
  # The first command that fails ends it all: nothing but what it says is of interest then.
  compose up -d
  wait_healthy keymanager database aggregator "${agents[@]}"
  say "dashboard: $dashboard"
  [[ ${MONITORING-} != yes ]] ||
    say "Grafana: http://127.0.0.1:${SHELORA_GRAFANA_PORT:-3000}/ (admin, password in deploy/compose/secrets/grafana_password)"
}

demo() {
  local agent folder=build/compose/adapters
  up
  operator federation create --rounds "${ROUNDS:-3}" --agents "${#agents[@]}" --quorum 2
  say "agent-1 encrypts a quarter of its columns, to show unequal budgets: unsafe by docs/privacy.md, allowed here"
  operator federation start --allow-unsafe
  operator federation status --watch --interval-s 5
  operator federation rounds
  for agent in "${agents[@]}"; do
    rm -rf "${folder:?}/$agent"
    mkdir -p "$folder/$agent"
    docker cp "$(compose ps -a -q "$agent" | head -1):/var/lib/shelora/adapters/." "$folder/$agent" >/dev/null
    rm -f "$folder/$agent"/state-*
    say "$agent: PEFT adapters $(cd "$folder/$agent" && echo round-*) in $folder/$agent"
  done
}

down() {
  if [[ ${VOLUMES-} == yes ]]; then
    MONITORING=yes compose down --remove-orphans --volumes
    rm -rf deploy/compose/secrets build/compose
  else
    MONITORING=yes compose down --remove-orphans
    say "state is kept in volumes; make compose-down VOLUMES=yes deletes it"
  fi
}

case "${1-}" in
  build | up | demo | down) check_engine; "$1" ;;
  *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;;
esac
