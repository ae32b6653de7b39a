# make check: what must pass before a commit, besides scripts/test.sh
PY ?= .venv/bin/python
.PHONY: check
check:
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/shellcheck $$(git ls-files "*.sh") .ci/run
