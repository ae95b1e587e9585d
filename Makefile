# Every target sets up all it needs in .venv by itself: with uv if there is one, else venv and pip.
PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
BIN := .venv/bin
NEWEST := .venv-newest/bin
export UV_PYTHON_DOWNLOADS = never

.PHONY: demo test verify test-newest bench clean

demo: .venv/ready
	$(BIN)/python examples/digits.py

# make test CACHE=.cache keeps compiled programs there for the next run.
CACHED = $(if $(CACHE),JAX_COMPILATION_CACHE_DIR=$(abspath $(CACHE)) \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1)

test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/pyright
	$(CACHED) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

verify: test
	$(CACHED) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

# The fast tests with the newest versions of everything, in an environment without constraints.
test-newest: .venv-newest/ready
	$(NEWEST)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --newest

# The exercises of the course, or the answers in another folder.
FROM ?= docs/course/exercises
grade: .venv/ready
	$(BIN)/python docs/course/exercises/grade.py $(FROM)

bench: .venv/ready
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/gpt.py
	$(BIN)/python benchmarks/optimizers.py
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

.venv-newest/ready: pyproject.toml
	@$(PYTHON_NEWEST) --version >/dev/null 2>&1 || { \
	  echo "make test-newest needs $(PYTHON_NEWEST), which is not installed;" \
	    "install it, or name another Python: PYTHON_NEWEST=..." >&2; exit 1; }
	rm -rf .venv-newest
	if command -v uv >/dev/null; then \
	  uv venv -q --python $(PYTHON_NEWEST) .venv-newest && \
	  uv pip install -q --python $(NEWEST)/python --upgrade -e '.[test]'; \
	else \
	  $(PYTHON_NEWEST) -m venv .venv-newest && \
	  $(NEWEST)/python -m pip install -q --disable-pip-version-check -e '.[test]'; \
	fi
	$(NEWEST)/python -m pip list 2>/dev/null | grep -E "^(jax|jaxlib|optax|flax|equinox) " || true
	touch $@

clean:
	rm -rf .venv .venv-newest build dist
