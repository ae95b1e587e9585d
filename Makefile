# Every target sets up all it needs in .venv by itself: with uv if there is one, else venv and pip.
PYTHON ?= python3
BIN := .venv/bin
export UV_PYTHON_DOWNLOADS = never

.PHONY: demo test verify bench clean

demo: .venv/ready
	$(BIN)/python examples/digits.py

test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

verify: test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

bench: .venv/ready
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/gpt.py
	$(BIN)/python benchmarks/resnet.py

.venv/ready: pyproject.toml constraints.txt
	if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python $(PYTHON) .venv && \
	  uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[test]'; \
	else \
	  $(PYTHON) -m venv .venv && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	fi
	touch $@

clean:
	rm -rf .venv build dist
