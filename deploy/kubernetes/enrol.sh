#!/usr/bin/env bash
# Makes the Secrets that no manifest holds. Tokens come from the running key manager; they work once, for one key.
#   enrol.sh kek                          a fresh key-encryption key; refuses to replace one
#   enrol.sh dev-database                 password and URL for the PostgreSQL of overlays/dev; refuses to replace them
#   enrol.sh aggregator [OPTION...]       the aggregator's enrolment
#   enrol.sh agent NAME [OPTION...]       an agent's, as Secret shelora-agent-NAME in shelora-agents
#   enrol.sh nodes [NODE...] [OPTION...]  one for each node, by default for those labelled shelora/agent=true
#   enrol.sh operator NAME FILE [OPTION...]  an operator's, as a file for this machine, reached by `kubectl port-forward`
# Options: --secret NAME           another name of the Secret
#          --server-name HOST      one more name under which the aggregator is reached; may be repeated
#          --keymanager HOST:PORT, --enrolment HOST:PORT   where the new member reaches the key manager, if not where
#                                  keymanager.yaml says; from inside the cluster shelora-keymanager.shelora.svc:7441 and :7442
#          --ttl SECONDS           validity of the token, 86400 unless given
set -euo pipefail
umask 077

server=shelora
agents=shelora-agents
devices=shelora-devices

fail() {
  printf 'enrol: %s\n' "$@" >&2
  exit 1
}

usage() {
  sed -n '2,13s/^# //p' "$0" >&2
  exit 2
}

exists() { # exists NAMESPACE SECRET
  kubectl --namespace "$1" get secret "$2" --output name --ignore-not-found | grep -q .
}

need_namespace() { # need_namespace NAMESPACE FOLDER
  kubectl get namespace "$1" --output name --ignore-not-found | grep -q . ||
    fail "there is no namespace $1; make it first: kubectl apply -k deploy/kubernetes/$2"
}

# Secrets go through pipes: arguments of a process are everybody's to read.
put() { # put NAMESPACE SECRET KEY: makes or replaces a Secret with one key, its value read from standard input
  kubectl --namespace "$1" create secret generic "$2" --from-file="$3=/dev/stdin" --dry-run=client --output yaml |
    kubectl apply --server-side --force-conflicts --filename - >/dev/null
  echo "enrol: Secret $2 in $1 holds $3"
}

token() { # token ROLE NAME: prints an enrolment file
  local role=$1 name=$2 pod=shelora-keymanager-0 addresses=() names=() host
  [[ -z ${enrolment-} ]] || addresses+=("SHELORA_KEYMANAGER__ADVERTISE_ENROLMENT=$enrolment")
  if [[ -n ${keymanager-} ]]; then
    [[ $role == aggregator ]] && host=MEMBERSHIP || host=KEYMANAGER
    addresses+=("SHELORA_KEYMANAGER__ADVERTISE_$host=$keymanager")
  fi
  for host in "${server_names[@]}"; do names+=(--server-name "$host"); done
  kubectl --namespace "$server" wait --for=condition=Ready "pod/$pod" --timeout=120s >/dev/null ||
    fail "the key manager is not ready; see: kubectl --namespace $server describe pod $pod, and its log"
  kubectl --namespace "$server" exec "$pod" --container keymanager -- \
    env "${addresses[@]}" shelora-keymanager token --config /etc/shelora/keymanager.yaml \
    --role "$role" --name "$name" --ttl "$ttl" "${names[@]}" ||
    fail "the key manager made no token for $role $name; its reason is above"
}

make_kek() {
  need_namespace "$server" overlays/dev
  exists "$server" shelora-keymanager-kek &&
    fail "Secret shelora-keymanager-kek exists. What the key manager has stored opens with this key only." \
      "To change it: README.md, section \"Rotation\"."
  head -c 32 /dev/urandom | base64 | put "$server" shelora-keymanager-kek keymanager.kek
  echo "enrol: back this key up, apart from the key manager's volume: either alone opens nothing"
}

make_dev_database() {
  local password
  need_namespace "$server" overlays/dev
  for secret in shelora-postgresql shelora-aggregator-database; do
    ! exists "$server" "$secret" || fail "Secret $secret exists, and the database knows its password"
  done
  password=$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
  put "$server" shelora-postgresql password <<<"$password"
  put "$server" shelora-aggregator-database database_url \
    <<<"postgresql+asyncpg://shelora:$password@shelora-postgresql.$server.svc:5432/shelora"
}

enrol_aggregator() {
  local made
  server_names+=(shelora-aggregator "shelora-aggregator.$server" "shelora-aggregator.$server.svc"
    "shelora-aggregator.$server.svc.cluster.local" localhost)
  : "${keymanager:=shelora-keymanager.$server.svc:7444}" "${enrolment:=shelora-keymanager.$server.svc:7442}"
  made=$(token aggregator main)
  put "$server" "${secret:-shelora-aggregator-enrolment}" enrolment.json <<<"$made"
}

enrol_agent() { # enrol_agent NAME
  local made
  need_namespace "$agents" agent/site
  made=$(token agent "$1")
  put "$agents" "${secret:-shelora-agent-$1}" enrolment.json <<<"$made"
}

# A node's name may hold dots and be long, an agent's may not.
agent_name() {
  local name=${1//./-}
  name=${name:0:63}
  printf '%s' "${name%%-}"
}

enrol_nodes() { # enrol_nodes NODE...
  local node made name=${secret:-shelora-agent-enrolments}
  need_namespace "$devices" agent/daemonset
  exists "$devices" "$name" || kubectl --namespace "$devices" create secret generic "$name" >/dev/null
  for node in "$@"; do
    made=$(token agent "$(agent_name "$node")")
    printf '{"data": {"%s.json": "%s"}}' "$node" "$(base64 --wrap=0 <<<"$made")" |
      kubectl --namespace "$devices" patch secret "$name" --type merge --patch-file /dev/stdin >/dev/null
    echo "enrol: Secret $name in $devices holds $node.json"
  done
}

enrol_operator() { # enrol_operator NAME FILE
  local made
  [[ ! -e $2 ]] || fail "$2 exists; name a new file"
  : "${keymanager:=localhost:7441}" "${enrolment:=localhost:7442}"
  made=$(token operator "$1")
  printf '%s\n' "$made" >"$2"
  echo "enrol: $2 makes its holder operator $1, once; keep it secret"
}

command -v kubectl >/dev/null || fail "kubectl is not installed"
action=${1-}
shift || usage
positional=() server_names=() ttl=86400 secret='' keymanager='' enrolment=''
while (($#)); do
  case $1 in
    --secret | --server-name | --keymanager | --enrolment | --ttl)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --secret) secret=$2 ;;
        --server-name) server_names+=("$2") ;;
        --keymanager) keymanager=$2 ;;
        --enrolment) enrolment=$2 ;;
        --ttl) ttl=$2 ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option $1" ;;
    *)
      positional+=("$1")
      shift
      ;;
  esac
done

case $action:${#positional[@]} in
  kek:0) make_kek ;;
  dev-database:0) make_dev_database ;;
  aggregator:0) enrol_aggregator ;;
  agent:1) enrol_agent "${positional[0]}" ;;
  nodes:0)
    mapfile -t positional < <(kubectl get nodes --selector shelora/agent=true --output name)
    ((${#positional[@]})) || fail "no node is labelled; choose some: kubectl label node NODE shelora/agent=true"
    enrol_nodes "${positional[@]#node/}"
    ;;
  nodes:*) enrol_nodes "${positional[@]}" ;;
  operator:2) enrol_operator "${positional[@]}" ;;
  *) usage ;;
esac
