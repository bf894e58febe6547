# make book · make test · make lab · make bench · make plan: each sets up what it needs first.
PYTHON   ?= python3
PROFILES ?= smollm2-135m
PROFILE  ?= smollm2-135m
BENCH    ?= step
GPU      ?= h100
GPUS     ?= 1
BIN      := .venv/bin
READY    := .venv/ready

.PHONY: book test browser lint lab train rehearse kills bench peers roundtrip delphi plan keep prune lock clean
.DELETE_ON_ERROR:

book: $(READY)
	$(BIN)/python -m metasae_lib fetch $(PROFILES)
	$(BIN)/python workflow/build.py $(PROFILES) $(if $(EXECUTOR),--executor $(EXECUTOR))

# The tests look at the tiny book too; it stands apart, so that a book made before stays as it is.
test: lint browser
	$(BIN)/python -m metasae_lib fetch tiny
	$(BIN)/python workflow/build.py tiny --output _build/test
	$(BIN)/pytest

# Pages are tested in a real browser. apt waits for another one only when it installs, so it is asked again.
BROWSER := apt-get -qq update && apt-get -qq -y -o DPkg::Lock::Timeout=600 install chromium
browser:
	@command -v chromium google-chrome >/dev/null && exit; mkdir -p _build; \
	  for try in $$(seq 120); do \
	    ($(BROWSER)) >_build/browser.log 2>&1 && exit; \
	    grep -q 'get lock' _build/browser.log || break; \
	    [ $$try -gt 1 ] || echo "Another apt is at work: waiting for its end"; sleep 5; \
	  done; \
	  tail -n 3 _build/browser.log; \
	  echo "The pages are tested in a browser, and none could be installed: see to it, then run make test again"; exit 1

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

lab: $(READY)
	$(BIN)/python -m metasae_lib fetch $(PROFILE)
	$(BIN)/jupyter lab notebooks

# Only the training, of GPUS processes (one a GPU): the notebooks find its arms.
train: $(READY)
	$(BIN)/python -m metasae_lib fetch $(PROFILE)
	$(BIN)/torchrun --standalone --nproc-per-node=$(GPUS) -m metasae_lib train $(PROFILE)

# All notebooks of gpt2-large or gemma-2-9b at their own shapes, with random weights and little text.
rehearse: $(READY)
	$(BIN)/python -m metasae_lib fetch smollm2-135m
	$(BIN)/python workflow/rehearse.py $(PROFILE) $(if $(LAYERS),--layers $(LAYERS))

bench: $(READY) $(if $(filter judge,$(BENCH)),.venv-serve/ready)
	$(BIN)/python benchmarks/$(BENCH).py

# A real run killed 24 times at random moments: the weights of one that was not.
kills: $(READY)
	$(BIN)/python -m metasae_lib fetch tiny
	$(BIN)/python benchmarks/kills.py

# The libraries that benchmarks measure against; a torchvision that does not match torch breaks their imports.
PEERS := .venv-peers/ready
peers: $(PEERS)
$(PEERS): benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --requirement benchmarks/peers/requirements.txt
	.venv-peers/bin/pip uninstall --quiet --yes torchvision
	touch $@

# Every calibrated arm of a profile, exported, in SAELens itself; and SAELens' own dictionaries in ours.
roundtrip: $(READY) $(PEERS)
	$(BIN)/python -m metasae_lib fetch tiny
	$(BIN)/python benchmarks/saelens_roundtrip.py

# An OpenAI-compatible server for `make bench BENCH=judge`, with our torch and transformers.
.venv-serve/ready: requirements.lock
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet --constraint requirements.lock 'transformers[serving]'
	touch $@

# Delphi's own prompts through our judge, on the features of a run that has been trained.
delphi: $(READY) .venv-delphi/ready
	$(BIN)/python benchmarks/delphi.py $(PROFILE)

# Delphi asks for vLLM and its CUDA, of which its scorers need nothing: so without its requirements.
.venv-delphi/ready: benchmarks/peers/delphi.txt
	$(PYTHON) -m venv .venv-delphi
	.venv-delphi/bin/pip install --quiet --no-deps eai-delphi==0.1.3
	.venv-delphi/bin/pip install --quiet --requirement benchmarks/peers/delphi.txt
	touch $@

plan: $(READY)
	$(BIN)/python -m metasae_lib plan $(PROFILE) --gpu $(GPU)

# The environment follows the lock: a changed pin or project file installs again, an interrupted install goes on.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed; name one: make book PYTHON=python3.11") if not (3, 11) <= sys.version_info < (3, 14) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/jupytext-config --settings-file .venv/share/jupyter/lab/settings/overrides.json set-default-viewer python
	touch $@

# Keep the small tables of a run in results/; RUN=<folder> takes one that another machine has made.
keep: $(READY)
	$(BIN)/python -m metasae_lib keep $(or $(RUN),runs/$(PROFILE))

# What takes space in runs/artefacts and may go; FREE="unused states" frees those kinds.
prune: $(READY)
	$(BIN)/python -m metasae_lib prune $(FREE)

# Resolve pyproject.toml anew. GPU libraries are left out of the lock: torch itself pins the ones it was built with.
lock:
	$(PYTHON) -m pip install --quiet --dry-run --ignore-installed --report .lock.json '.[test]'
	$(PYTHON) -c 'import json; found = [p["metadata"] for p in json.load(open(".lock.json"))["install"]]; \
	  pins = {"%s==%s" % (p["name"].lower(), p["version"].split("+")[0]) for p in found}; \
	  print("\n".join(sorted(p for p in pins if not p.startswith(("nvidia", "triton", "cuda", "metasae")))))' > .lock.new
	mv .lock.new requirements.lock && rm .lock.json

clean:
	rm -rf _build runs .snakemake
