.DEFAULT_GOAL := help
.PHONY: audit bench report help install demo test test-slow lint docs

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: ## own virtual environment, etcd and NATS
	@scripts/install.sh

demo: install ## serve a real model, send one request, keep serving
	@.venv/bin/dynamo demo

test: install ## all tests but the slow ones
	@.venv/bin/python -m pytest -q

test-slow: install ## the long tests
	@.venv/bin/python -m pytest -q -m slow

lint: install ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: install ## serving under load, every system in turn: ten minutes on two cores
	@.venv/bin/pip install -q -e '.[bench]'
	@.venv/bin/python -m benchmarks.serving --quick

report: install ## benchmarks/report.md and its plots again, from the raw samples
	@.venv/bin/pip install -q -e '.[bench]'
	@.venv/bin/python -m benchmarks.serving --report-only

audit: install ## known vulnerabilities of the installed packages (asks PyPI's service)
	@.venv/bin/pip install -q 'pip-audit>=2.7,<3'
	@.venv/bin/pip-audit --skip-editable

docs: install ## the documentation as a web site in build/docs
	@.venv/bin/pip install --quiet -e '.[docs]' && .venv/bin/mkdocs build
