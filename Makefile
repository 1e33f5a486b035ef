# make demo   set up, then train, encode, search and ask on real text; see recipes/demo.sh
# make test   set up, then check style and run all tests
# make browser   install Chromium (Debian, Ubuntu; as root), so that `make test` opens the page of a run in it
# make assignment A=2 OUT=folder   set up, then make a folder for assignment 2 of the course; see course/README.md
PYTHON ?= python3

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@# Without a GPU, uv knows where torch's CPU build is; pip takes the default build, which works as well but is larger.
	@if ! command -v nvidia-smi >/dev/null && command -v uv >/dev/null; then \
		uv pip install -q --python .venv/bin/python --torch-backend cpu torch==2.13.0 || true; fi
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

setup: .venv/ready

demo: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash recipes/demo.sh

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

browser:
	apt-get update -qq && apt-get install -y -qq chromium

assignment: .venv/ready
	.venv/bin/python course/kit.py make $(A) --student $(or $(STUDENT),me) --out $(OUT)

clean:
	rm -rf .venv runs/demo data/demo

.PHONY: setup demo test browser assignment clean
