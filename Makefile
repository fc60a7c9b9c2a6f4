# `make help` lists what there is. Every target but help and clean sets up .venv first, which costs nothing once it is current.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin

# Options of the demo, passed on only when given to make itself (make demo DATA=mine.jsonl ROUNDS=5): names as common as TEST
# or OUT may stand in anybody's environment.
DEMO_OPTIONS := DATA TEST MODEL AGENTS ROUNDS RANKS BUDGETS COMPARE PACKING OUT
lower = $(shell tr '[:upper:]' '[:lower:]' <<<'$(1)')
quoted = '$(subst ','\'',$(1))'
given = $(and $(findstring command line,$(origin $(1))),$($(1)))
demo_arguments = $(foreach name,$(DEMO_OPTIONS),$(if $(call given,$(name)),--$(call lower,$(name)) $(call quoted,$($(name)))))

# Options of the measurements.
bench_arguments = $(if $(call given,PUBLISH),--publish) $(if $(call given,FRESH),--fresh)

# Options of the compose targets, for scripts/compose.sh.
COMPOSE_OPTIONS := PYTHON_IMAGE TORCH TORCH_INDEX MONITORING ROUNDS VOLUMES
compose_environment = $(foreach name,$(COMPOSE_OPTIONS),$(if $(call given,$(name)),$(name)=$(call quoted,$($(name)))))

.PHONY: help setup demo bench parity audit test check format protos lock clean images compose-up compose-demo compose-down compose-test k8s-validate

help: ## list the targets
	@echo 'SHE-LoRA: federated fine-tuning with selectively encrypted LoRA updates'
	@echo
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name text; do \
	  printf '  make %-13s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  options of the demo: DATA=train.jsonl TEST=test.jsonl MODEL=path AGENTS=4 ROUNDS=3 RANKS=4,8,16,32'
	@echo '                       BUDGETS=full,25%,5%,auto COMPARE=plaintext PACKING=dense OUT=build/demo'
	@echo '  options of bench, parity and audit: PUBLISH=1 FRESH=1; of parity: SEEDS=3'
	@echo '  options of images and compose: PYTHON_IMAGE=python:3.12-slim-trixie TORCH=cpu|cuda TORCH_INDEX=url'
	@echo '                       MONITORING=yes ROUNDS=3 VOLUMES=yes'

setup: ## find a usable Python, make .venv, install the locked packages
	@scripts/setup.sh

demo: setup ## key manager, aggregator and four agents tune a model together on this machine
	@exec $(BIN)/python -m services.operators.demo $(demo_arguments)

bench: setup ## measure speed, bytes and memory, report in build/bench (PUBLISH=1 rewrites docs/benchmarks.md)
	@$(BIN)/python -m bench speed $(bench_arguments)
	@$(BIN)/python -m bench aggregator $(bench_arguments)

parity: setup ## accuracy against other ways to average, report in build/bench (PUBLISH=1 rewrites docs/benchmarks.md)
	@exec $(BIN)/python -m bench parity $(bench_arguments) $(if $(call given,SEEDS),--seeds $(SEEDS))

audit: setup ## attack what the aggregator sees, report in build/audit (PUBLISH=1 rewrites docs/privacy.md and its table)
	@exec nice $(BIN)/python -m bench audit $(bench_arguments)

test: check ## everything CI runs: check, then all tests, in containers too where a Docker Engine answers
	@scripts/test.sh

images: ## build the container images of aggregator, key manager and client agent
	@$(compose_environment) scripts/compose.sh build

compose-up: ## start key manager, aggregator on PostgreSQL and three agents in containers, mutual TLS and encryption on
	@$(compose_environment) scripts/compose.sh up

compose-demo: ## compose-up, then a federation to its end; the adapters are copied out
	@$(compose_environment) scripts/compose.sh demo

compose-down: ## stop and remove the containers; VOLUMES=yes also deletes their state
	@$(compose_environment) scripts/compose.sh down

compose-test: setup ## build the images and test a cluster on a real Docker Engine, deaths included
	@SHELORA_REQUIRE_DOCKER=1 $(BIN)/python -m pytest tests/deploy/test_compose.py tests/deploy/test_two_hosts.py

k8s-validate: setup ## render and validate every Kubernetes overlay, check our policies, exercise the probes
	@scripts/k8s-validate.sh

check: setup ## formatting, lint, types, import rules, the contract and its generated stubs
	@scripts/check.sh

format: setup ## rewrite the Python files and the protos in the house's format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .
	@$(BIN)/buf format -w

protos: setup ## generate shelora/v1 from protos/shelora/v1
	@scripts/protos.sh

lock: setup ## pin requirements/*.txt anew from pyproject.toml (scripts/lock.sh --upgrade moves the pins)
	@scripts/lock.sh

clean: ## remove build outputs and caches; keeps .venv
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
