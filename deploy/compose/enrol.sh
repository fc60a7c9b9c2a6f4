#!/bin/sh
# One-shot container before the others: sets the key manager up where it is not yet, and puts a fresh one-time token in front of
# every member that is named. A member that has a certificate already does not look at it.
#   enrol.sh aggregator=NAME operator=NAME agent=NAME...
set -eu
config=/etc/shelora/keymanager.yaml
shelora-keymanager init --config "$config"
for member in "$@"; do
  role=${member%%=*} name=${member#*=}
  set -- --config "$config" --role "$role" --name "$name" --ttl 3600 --out "/etc/shelora/enrolment/$name/enrolment.json"
  [ "$role" != aggregator ] || set -- "$@" --server-name aggregator ${SERVER_NAME:+--server-name "$SERVER_NAME"}
  shelora-keymanager token "$@"
done
