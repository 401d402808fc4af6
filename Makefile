# make sample   sets everything up in .venv and turns assets/input.png into out.mp4
# make test     sets everything up in .venv and runs the tests
PYTHON ?= python3
VENV := .venv
IMAGE ?= assets/input.png
OUT ?= out.mp4

.PHONY: sample test lint clean

sample: $(VENV)/run
	$(VENV)/bin/python sampler.py --image $(IMAGE) --out $(OUT)

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

# A stamp is written last, so an interrupted installation is done again.
$(VENV)/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
