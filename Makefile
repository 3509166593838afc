# `make help` lists the targets. Each sets up what it needs by itself.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.t5-book-ready
UNFINISHED := $(VENV).unfinished

# One thread each: several threads become very slow when other work shares
# the cores, and printed digits depend on their number. The last chapter sets
# its own number of threads.
export OMP_NUM_THREADS ?= 1

# Python keeps what it has compiled; else each process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help book test lab tidy outputs clean

help:
	@echo "make book      run every chapter, train the toy T5, build the site"
	@echo "make test      run all tests, and every chapter as a test"
	@echo "make lab       open the chapters in JupyterLab"
	@echo "make outputs   bring up to date what is made from the chapters: the package,"
	@echo "               the maps, the page 'Paper and code', the texts for the tests"
	@echo "make tidy      write the chapters the way JupyterLab saves them"
	@echo "make clean     remove what was built (not $(VENV))"

book: $(READY)
	$(RUN) tools/export.py
	$(RUN) tools/run.py
	$(VENV)/bin/jupyter-book build . --quiet -W --keep-going
	@echo "The book is ready. Open $(CURDIR)/_build/html/index.html"

# The chapters run first, with progress; pytest then compares what they printed
# and runs again those that failed. (`pytest --nbval` runs them all itself.)
# Its two workers take a file at a time, so the cells of a chapter stay in order,
# and the files by name: by their numbers of tests, the slow ones would be last.
# What depends on rounding then runs once more, as on a processor without vector
# instructions: torch, and MKL where there is one, sum in another order.
test: $(READY)
	-$(RUN) tools/run.py
	$(RUN) -m pytest --nbval --nbval-reuse -n 2 --dist loadfile \
	  --no-loadscope-reorder
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(RUN) -m pytest \
	  tests -m rounding -n 2 --dist loadfile --no-loadscope-reorder

lab: $(READY)
	$(RUN) -m jupyterlab workspaces import tools/workspace.json
	$(RUN) -m jupyterlab --LabApp.default_url=/lab/workspaces/t5-book

outputs: $(READY)
	$(RUN) tools/export.py
	$(RUN) tools/draw_maps.py
	$(RUN) tools/ledger.py
	$(RUN) tools/run.py --store

tidy: $(READY)
	$(VENV)/bin/jupytext --to md:myst $$(grep -l '{code-cell}' chapters/*.md)

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

# Installed once, and again when what is to be installed changes. A new pip
# saves some half a minute. Python compiles what it imports; compiling all of it
# here would take minutes. An environment that was stopped while it was made
# has no pip, or half of one; a file beside it says so until it is finished.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@if test -e $(UNFINISHED); then rm -rf $(VENV); fi
	@if test ! -x $(RUN); then \
	  echo "Making $(VENV)"; touch $(UNFINISHED); \
	  $(PYTHON) -m venv --upgrade-deps $(VENV) && rm $(UNFINISHED); fi
	@echo "Installing into $(VENV): some minutes, some 1.5 GB."
	$(RUN) -m pip install --quiet --no-compile -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps -e .
	@touch $@
