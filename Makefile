# The newcomer's two commands: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test bench lint docs wheel clean

demo: $(VENV)/.installed
	$(VENV)/bin/whisperd demo

test: $(VENV)/.installed-dev lint
	./scripts/debian-packages espeak-ng ffmpeg systemd dbus iproute2 gcc libc6-dev strace e2fsprogs xfsprogs \
		rsync samba smbclient sshfs openssh-client openssh-sftp-server
	$(VENV)/bin/python -m pytest

bench: $(VENV)/.installed-bench
	./scripts/debian-packages ffmpeg
	$(VENV)/bin/python -m bench.all

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-dev
	$(VENV)/bin/python scripts/generate_docs.py

wheel: $(VENV)/.installed-dev
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch goes first and alone: a later, wider wish for it would bring another build with gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	./scripts/debian-packages --python $(PYTHON)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# whisper-s2t asks for other versions than it needs.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	$(PIP) install --no-deps whisper-s2t==1.3.1
	touch $@
