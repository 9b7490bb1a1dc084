# make quickstart   phantoms, training, prediction, scores: minutes on a laptop
# make test         style and tests on two cores, in an environment of their own
# make docs-check   every command of README and docs on tiny data: minutes
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test docs-check clean

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Cases 000 to 007 train and validate; 008 to 011 are seen by the last three commands alone.
quickstart: $(VENV)/ready
	$(RUN) prepare.py --phantom scroll --cases 12 --shape 80 80 80 --seed 0 --out data/quickstart
	$(RUN) train.py configs/quickstart.yaml run.name=quickstart_untrained training.max_steps=0
	$(RUN) infer.py --ckpt runs/best.pt --output runs/predictions/untrained
	$(RUN) train.py configs/quickstart.yaml
	$(RUN) infer.py --ckpt runs/best.pt --output runs/predictions/quickstart
	$(RUN) evaluate.py --pred runs/predictions/quickstart runs/predictions/untrained \
		--otsu data/quickstart --truth data/quickstart --out runs/quickstart_scores.csv \
		--overlays runs/overlays

test: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

docs-check: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.docs_check

clean:
	rm -rf $(VENV) data/quickstart
