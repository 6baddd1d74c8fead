# make demo | test | lint | docs | clean. The first call makes .venv and installs vssm with what they need into it.

VENV   ?= .venv
TORCH  ?= torch torchvision
EXTRAS ?= dev
ARGS   ?=

# The first Python from 3.10 on; set PYTHON to choose another.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
    "$$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$name" && break; done)

READY := $(VENV)/ready
RUN   := $(VENV)/bin/python

.PHONY: demo test lint format docs clean

demo: $(READY)  ## train a small model on 5,000 real digits
	$(RUN) tools/train.py fit --config configs/classification/vmamba_mnist5k.yaml $(ARGS)

test: $(READY)  ## the plain suite, a process with one thread for each core; make test ARGS='-m slow' for the rest
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n auto $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .

docs: $(READY)  ## rewrite the generated tables
	$(RUN) tools/docs.py
	$(RUN) tools/speed.py

# mmengine asks for opencv-python, albumentations for its headless twin; both write the folder cv2, and the first one needs
# libGL, which a machine without a screen may lack. So the headless one is put in its place.
HEADLESS = if $(RUN) -m pip show -q opencv-python 2>/dev/null; then \
    $(RUN) -m pip uninstall -y opencv-python && $(RUN) -m pip install --force-reinstall --no-deps opencv-python-headless; fi

# pip is installed into the environment by the outer pip where Python came without ensurepip (Debian).
$(READY): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "make: vssm needs Python 3.10 or newer with the module venv; install one, or name it: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install pip; }
	$(RUN) -m pip install $(TORCH) -e ".[$(EXTRAS)]"
	@$(HEADLESS)
	touch $@

clean:
	rm -rf $(VENV) build dist vssm.egg-info
