#!/bin/sh
# Makes what the compose files expect beside them and never replaces what is there: passwords, folders for enrolment files, and, where
# no data is given, a demonstration's data for three agents.
#   prepare.sh [AGENT...]     default: agent-1 agent-2 agent-3
set -eu
cd "$(dirname "$0")"
secrets=${SHELORA_SECRETS:-secrets}
data=${SHELORA_DATA:-data}
shelora_uid=10001

[ $# -gt 0 ] || set -- agent-1 agent-2 agent-3

# The folder is for its owner alone. Below it the containers' user has to read and write, whoever owns the files on this host.
mkdir -p "$secrets"
chmod 0700 "$secrets"

password() { # password FILE
  [ -s "$secrets/$1" ] && return
  od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$secrets/$1.new"
  chmod 0644 "$secrets/$1.new"
  mv "$secrets/$1.new" "$secrets/$1"
}

password database_password
password grafana_password
if [ ! -s "$secrets/database_url" ]; then
  printf 'postgresql+asyncpg://shelora:%s@database:5432/shelora' "$(cat "$secrets/database_password")" >"$secrets/database_url"
  chmod 0644 "$secrets/database_url"
fi

for member in aggregator operator "$@"; do
  mkdir -p "$secrets/enrolment/$member"
done
if [ "$(id -u)" = 0 ]; then
  chown -R "$shelora_uid:$shelora_uid" "$secrets/enrolment"
else
  chmod 0777 "$secrets/enrolment" "$secrets"/enrolment/*/
fi

number=0
for agent in "$@"; do
  number=$((number + 1))
  [ ! -e "$data/$agent" ] || continue
  mkdir -p "$data/$agent"
  # Shares of 3 : 2 : 1, and so on in turn.
  awk -v mine="$number" 'BEGIN { split("1 1 1 2 2 3", owner) } owner[NR % 6 + 1] == (mine - 1) % 3 + 1' \
    ../../examples/data/routing_train.jsonl >"$data/$agent/train.jsonl"
  cp ../../examples/data/routing_test.jsonl "$data/$agent/test.jsonl"
  chmod 0755 "$data" "$data/$agent"
  chmod 0644 "$data/$agent"/*
done
