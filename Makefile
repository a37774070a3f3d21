# Everything from a fresh clone: `make demo`, `make test`. The environment is made on first use and is remade when
# this file or setup.py changes; PYTHON chooses the interpreter, TORCH, TORCHVISION and AUTO_LIRPA the releases:
#   make test PYTHON=python3.12 TORCH=torch==2.11.0 TORCHVISION=torchvision==0.26.0

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
AUTO_LIRPA  ?= auto_LiRPA==0.3
VENV        ?= .venv

RUN   := $(VENV)/bin/python
PIP   := $(RUN) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

SEEDS := 0 1 2
FAMILIES := crown_ibp mixtrain adversarial stability
HYDRA := $(foreach seed,$(SEEDS),runs/fashion_mnist_hydra-$(seed))

.PHONY: help venv demo test test-all lint bench
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z/.-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 32

venv: $(READY) ## make .venv with everything in it

# The order matters. torch comes first and is pinned, so that nothing replaces it. torchvision and auto_LiRPA come
# without their requirements: torchvision's wheel asks for one exact build of torch, and auto_LiRPA 0.3 for
# torch < 1.13. certifiers/bridges.py makes both load beside this torch, so pip need not warn of that.
$(READY): setup.py Makefile
	@test -x $(RUN) || { echo "Making $(VENV) with $$($(PYTHON) --version 2>&1)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) (the largest part; minutes on a slow line)"
	@$(PIP) "$(TORCH)"
	@echo "Installing $(TORCHVISION) and $(AUTO_LIRPA)"
	@$(PIP) --no-deps "$(TORCHVISION)" "$(AUTO_LIRPA)"
	@echo "Installing certprune and the rest"
	@$(PIP) --no-warn-conflicts -e '.[test]'
	@touch $@
	@echo "$(VENV) is ready"

demo: venv ## the main job, small: pretrain, prune, finetune, certify, report
	$(RUN) run.py demo

test: venv ## the tests that take minutes at most together
	$(RUN) -m pytest -q -m "not slow"

test-all: venv ## all tests
	$(RUN) -m pytest -q

lint: venv ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv ## bounds against plain training and auto_LiRPA, as ratios in one process
	$(RUN) benchmarks/bounds.py -o results/bounds.md
	$(RUN) benchmarks/fusion.py results/fusion.md

# About two hours; interrupted, the same command goes on. One thread each, so that seeds may run side by side.
results/hydra.md: venv ## learned scores against least magnitude on Fashion-MNIST, three seeds
	for seed in $(SEEDS); do \
	  $(RUN) run.py run configs/fashion_mnist/hydra.yaml seed=$$seed output=runs/fashion_mnist_hydra-$$seed threads=1 \
	  || exit 1; \
	done
	$(RUN) run.py table $(HYDRA) --title "Learned scores against least magnitude, Fashion-MNIST at eps 0.1" -o $@

# The rest takes hours; interrupted, the same command goes on. `make -j2` runs two at a time, one thread each.
OBJECTIVES := $(foreach family,$(FAMILIES),$(foreach seed,$(SEEDS),runs/$(family)-$(seed)))
PRUNING := $(foreach seed,$(SEEDS),runs/pruning-$(seed))
CONFIRM := $(foreach seed,3 4 5 6 7 8,runs/pruning_confirm-$(seed))
LARGE := $(foreach seed,$(SEEDS),runs/pruning_large-$(seed))
ONCE := runs/pruning_parts-0 runs/pruning_benign-0
.PHONY: $(OBJECTIVES) $(PRUNING) $(CONFIRM) $(LARGE) $(ONCE)
$(OBJECTIVES) $(PRUNING) $(CONFIRM) $(LARGE) $(ONCE): runs/%: venv
	$(RUN) run.py run configs/fashion_mnist/$(basename $(subst -,.,$*)).yaml \
	  seed=$(lastword $(subst -, ,$*)) output=$@ threads=1

# Dense networks alone.
DENSE := $(foreach seed,$(SEEDS),runs/ibp-$(seed)) runs/mtl_ibp-0 runs/sabr-0
.PHONY: $(DENSE)
$(DENSE): runs/%: venv
	$(RUN) run.py run configs/fashion_mnist/$(basename $(subst -,.,$*)).yaml \
	  seed=$(lastword $(subst -, ,$*)) output=$@ threads=1 'variants=[{dense: true}]'

results/objectives.md: $(OBJECTIVES) $(DENSE) ## families of objectives on Fashion-MNIST, dense and pruned, three seeds
	$(RUN) run.py compare $^ --title "Families of objectives, Fashion-MNIST" -o $@

# Dense networks with as many weights as are left at 90, 95, 99, 99.5, 99.8 and 99.9 %.
WIDTHS := 0.316 0.223 0.097 0.068 0.046 0.025
SMALL := $(foreach width,$(WIDTHS),runs/pruning_small_$(width)-0)
.PHONY: $(SMALL)
$(SMALL): runs/pruning_small_%-0: venv
	$(RUN) run.py run configs/fashion_mnist/pruning_small.yaml model.width=$* output=$@ threads=1

results/pruning.md: $(PRUNING) runs/pruning_benign-0 $(SMALL) ## what to prune by: the evidence
	$(RUN) run.py table $^ --title "What to prune by, and how much of each layer: Fashion-MNIST" -o $@

results/pruning-confirmed.md: $(CONFIRM) ## what pruning.md found of the smallest networks, asked of six new seeds
	$(RUN) run.py table $^ --title "The smallest networks again, six seeds of their own: Fashion-MNIST" -o $@ \
	  --note "pruning.md found scores and weights together ahead of magnitude where networks are small, with three \
	seeds too few to be sure. Criteria, budgets, schedules, sparsities, seeds and the test were fixed in \
	configs/fashion_mnist/pruning_confirm.yaml before these six ran."

results/pruning-parts.md: runs/pruning_parts-0 ## what each part of the strongest method is worth
	$(RUN) run.py table $^ --title "What each part of the method is worth, at 99.8 %: Fashion-MNIST" -o $@

results/pruning-large.md: $(LARGE) ## the same for a larger network
	$(RUN) run.py table $^ --title "Pruning a larger network: Fashion-MNIST" -o $@ \
	  --note "The rate of the scores, 0.03, was chosen on validation images, after a look at the test images: with that of \
	the small network, prune.optimizer.lr=0.3, and with 0.1 seed 2 collapses to one class."

# For a GPU: the table of networks at 0, 90, 95 and 99 % by CROWN-IBP and by smoothing, at the width of cnn_large and
# CNN7. OPTIONS are settings of the recipes, e.g. OPTIONS="model.width=0.05 pretrain.epochs=1" for a trial on a CPU.
WIDE := $(foreach objective,crown_ibp stability,$(foreach model,cnn_large cnn7,runs/wide-$(objective)-$(model)))
OPTIONS ?= speed.channels_last=true
.PHONY: $(WIDE) wide
$(WIDE): runs/wide-%: venv
	$(RUN) run.py run configs/fashion_mnist/$(firstword $(subst -, ,$*)).yaml \
	  name=$(subst -,_,$(@F)) model.name=$(lastword $(subst -, ,$*)) output=$@ $(OPTIONS)

wide: $(WIDE) ## cnn_large and CNN7 by CROWN-IBP and by smoothing, dense and pruned, in results/wide.md; for a GPU
	$(RUN) run.py compare $^ --title "Wide networks, Fashion-MNIST" -o results/wide.md
