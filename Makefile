# make check: what must pass before a commit, besides scripts/test.sh
PY ?= .venv/bin/python
.PHONY: check
check:
	$(PY) -m ruff check .
	$(PY) -m mypy
	git ls-files -z | xargs -0 .venv/bin/detect-private-key
	git ls-files -z | xargs -0 .venv/bin/check-added-large-files --enforce-all --maxkb=1024
	.venv/bin/shellcheck $$(git ls-files "*.sh") .ci/run
