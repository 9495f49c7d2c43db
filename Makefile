.DEFAULT_GOAL := help
.PHONY: audit bench report help install lock demo test test-unit test-slow lint docs

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: ## own virtual environment, etcd and NATS
	@scripts/install.sh

lock: install ## the lock files again, with the newest versions that pyproject.toml allows
	@scripts/lock.sh --upgrade

demo: install ## serve a real model, send one request, keep serving
	@.venv/bin/dynamo demo

test: install ## all tests but the slow ones
	@scripts/test.sh

test-unit: install ## the tests that start no engine and no graph
	@scripts/test.sh unit

test-slow: install ## the long tests
	@.venv/bin/python -m pytest -q -m slow

lint: install ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: install ## serving under load, every system in turn: ten minutes on two cores
	@.venv/bin/python -m benchmarks.serving --quick

report: install ## benchmarks/report.md and report-policy.md again, from the raw samples
	@.venv/bin/python -m benchmarks.serving --report-only
	@.venv/bin/python -m benchmarks.policy --report-only

audit: install ## known vulnerabilities of the locked packages (asks PyPI's service)
	@.venv/bin/uv tool run --quiet 'pip-audit>=2.7,<3' --disable-pip --no-deps --requirement requirements.lock

docs: install ## the documentation as a web site in build/docs
	@.venv/bin/mkdocs build
