# make read     open the book in JupyterLab
# make test     lint, library, chapters, HTML book in a browser
# make book     build the HTML book into book/_build/html
# make bench    time the operator and a whole detector against their peers
# make results  train what data/ ships and run all studies; takes long, says how long, resumes;
# make results STUDY=cost  run one study, of those in experiments/study.py
#
# Each target makes .venv and installs what it needs on its first run; later runs need no network.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
CHAPTERS := $(wildcard chapters/*.ipynb)
# matplotlib's list of fonts, made now and not, with a message, in a reader's first figure
WARM_UP = @$(BIN)/python -c 'import matplotlib.font_manager'
DIGITS := data/digits/annotations/test.json

# two installations at once would spoil .venv
.NOTPARALLEL:
.PHONY: help read test book bench results
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

read: .venv/.book $(DIGITS)
	@options=""; \
	[ "$$(id -u)" = 0 ] && options="--allow-root"; \
	if [ "$$(uname)" = Linux ] && [ -z "$$DISPLAY$$WAYLAND_DISPLAY" ]; then \
		options="$$options --no-browser"; \
		echo "No screen here: open the address that JupyterLab prints below."; \
	fi; \
	$(BIN)/jupyter lab chapters $$options

# two processes with one thread each, not two that fight for the cores
test: export OMP_NUM_THREADS := 1
test: .venv/.dev $(DIGITS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest tests $(CHAPTERS) --nbval --nbval-kernel-startup-timeout 300 -n 2 --dist loadfile \
		--durations 5

book: .venv/.book
	$(BIN)/python book/build.py book/_build
	@echo "The book is in book/_build/html/index.html"

bench: .venv/.dev
	$(BIN)/python benchmarks/operator.py
	$(BIN)/python benchmarks/model.py

# glibc: keep memory between steps, in large pages; a fifth more steps a second
results: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000
results: .venv/.book $(DIGITS)
ifdef STUDY
	$(BIN)/python experiments/study.py $(STUDY)
else
	$(BIN)/python data/make_digits.py --masks
	$(BIN)/python experiments/digits.py
	$(BIN)/python experiments/refinement.py
	$(BIN)/python experiments/gradient_cut.py
	$(BIN)/python experiments/memory.py
	$(BIN)/python experiments/looking.py
	$(BIN)/python experiments/backbones.py
	$(BIN)/python experiments/study.py
	$(BIN)/python experiments/study.py tuned_members
	$(BIN)/python experiments/equal_cost.py
	$(BIN)/python experiments/trees.py
	$(BIN)/python book/readme.py
	$(BIN)/python book/journey.py
endif

$(DIGITS): | .venv/.book
	$(BIN)/python data/make_digits.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make read PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.book: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv; the first time this takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[book]'
	$(WARM_UP)
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv; the first time this takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	$(WARM_UP)
	@touch .venv/.book $@
