# Everything here works on a machine that has only Python (3.10 or newer) and make: .venv is set up when first needed.
#   PYTHON=python3.12        the interpreter to make .venv with
#   CPU=1                    on Linux without a GPU: fetch the small CPU build of torch, not the CUDA build
#   TORCH_PREINSTALLED=1     on a GPU machine: keep the torch that is there (PYTHON must be the interpreter that has it)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run lab html test baseline quick execute check elsewhere bench gpu figures lint student repo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make run CH=05, make execute CH=05 and make check CH=05 take one chapter; options: see the top of Makefile"

setup: $(READY) ## create .venv (or bring it up to date) with everything the book needs

# torch comes first, in a step of its own: no later step can then exchange it for another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit( \
	    'The book needs Python 3.10 or newer, and $(PYTHON) is ' + sys.version.split()[0] + \
	    '. Name a newer one: make setup PYTHON=python3.12')"
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
ifeq ($(TORCH_PREINSTALLED),1)
	@$(PYTHON) -c "import torch" || { echo "TORCH_PREINSTALLED=1, but $(PYTHON) has no torch."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	grep -v -E '^torch(vision)?==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -c "import torch" || \
	    { echo "$(VENV) does not see the torch of $(PYTHON): is that one a virtual environment itself?"; exit 1; }
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" >> $(VENV)/constraints.txt
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt \
	    $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu) torch torchvision
endif
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

run: setup ## execute every chapter and render the linked book to _build/html (stored notebooks stay as they are)
	$(BIN)/python chapters/book/book.py run $(CH)

lab: setup ## open the chapters in JupyterLab
	$(BIN)/python -m jupyterlab --notebook-dir=chapters

html: setup ## render the book from the stored outputs, without running anything
	$(BIN)/python chapters/book/book.py html

# A process for each core, at most eight of them (a gigabyte each); conftest.py says what goes where.
WORKERS := -n auto --maxprocesses 8 --max-worker-restart 0

test: setup ## everything: the package's tests, and every chapter compared with its stored outputs
	$(BIN)/python -m pytest --nbval $(WORKERS)

# What every x86-64 processor of the last fifteen years can do: torch, MKL, oneDNN, and OpenBLAS (NumPy, SciPy).
BASELINE := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem

baseline: setup ## the same, with the arithmetic of an old processor: do tests or chapters rest on this one's last digits?
	$(BASELINE) $(BIN)/python -m pytest --nbval $(WORKERS)

quick: setup ## the tests without the chapters
	$(BIN)/python -m pytest tests $(WORKERS)

execute: setup ## run chapters in place and store their outputs (FRESH=1: timings too, if nothing else changed)
	$(BIN)/python chapters/book/book.py execute $(CH) $(if $(FRESH),--fresh)

check: setup ## run chapters and compare with what is stored, change nothing
	$(BIN)/python chapters/book/book.py check $(CH)

elsewhere: setup ## would the chapters say the same on a GPU? (an hour; tests/elsewhere.py says what is asked)
	$(BIN)/python tests/elsewhere.py device $(CH)
	$(BIN)/python tests/elsewhere.py rounding $(CH)

bench: setup ## what a hypergradient costs: the book's record; BENCH="--models linear": a trial, in runs/
	$(BIN)/python -m bilevel_lite bench $(if $(BENCH),$(BENCH),--publish)

gpu: setup ## ten minutes of a GPU: tests, bench, chapters, a slice of a study (GPU="--minutes 10 --study NAME")
	$(BIN)/python tests/gpu.py $(GPU)

figures: setup ## draw the figures from figures/data
	$(BIN)/python -m bilevel_lite figures

lint: setup ## style of the code, the notebooks' too
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

student: setup ## the edition for students, without answers, in _build/student
	$(BIN)/python chapters/book/student.py

repo: setup ## set the repository's address everywhere: that of origin, or ADDRESS=owner/name
	$(BIN)/python chapters/book/book.py repo $(ADDRESS)

clean: ## remove what was built (not .venv)
	rm -rf _build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
