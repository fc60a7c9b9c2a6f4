#!/usr/bin/env bash
# Checks deploy/kubernetes without a cluster: every overlay, component and agent kind renders, fits the Kubernetes API and keeps our
# policies, and the probes do what a kubelet expects of the real processes. Needs kubectl.
#   scripts/k8s-validate.sh           check
#   scripts/k8s-validate.sh --write   make the PrometheusRule anew from deploy/monitoring/prometheus/alerts.yml
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

write_alerts() {
  local rule=deploy/kubernetes/components/monitoring/prometheusrule.yaml
  {
    printf '# Made from deploy/monitoring/prometheus/alerts.yml by scripts/k8s-validate.sh --write; do not edit.\n'
    printf 'apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: shelora\n  namespace: shelora\nspec:\n'
    sed -e '/^#/d' -e '/^---$/d' -e 's/^\(.\)/  \1/' deploy/monitoring/prometheus/alerts.yml
  } >"$rule"
  echo "k8s-validate: wrote $rule"
}

case "${1-}" in
  "") ;;
  --write) write_alerts; exit 0 ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac

SHELORA_REQUIRE_KUBECTL=1 exec "$bin/python" -m pytest --quiet -n 2 --dist loadfile \
  tests/deploy/test_kubernetes.py tests/deploy/test_kubernetes_probes.py
