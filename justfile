# Recipes of this project. `./just RECIPE` needs only python3; `just RECIPE` works if just is installed.
# Every program is called by its path in .venv, so an active environment does not matter.
# More arguments are passed on: `./just demo --max_iters=100`.

set positional-arguments

root := justfile_directory()
bin := root / ".venv" / if os_family() == "windows" { "Scripts" } else { "bin" }
python := bin / "python"

export HERE := invocation_directory()
export LLM_ACTIVATE := bin / "activate" # llm-train and llm-prepare print how to activate .venv

# Shell text: puts the recipe's first argument into $first; a path is relative to the user's working directory.
first := 'first=$1; shift; [ "$HERE" = "$PWD" ] || [ ! -e "$HERE/$first" ] || first=$HERE/$first'

[private]
default:
    @"{{ just_executable() }}" --justfile "{{ justfile() }}" --list --unsorted

# Make .venv with these extras. Quick if they are installed
[private]
[no-exit-message]
_env *EXTRAS:
    @sh "{{ root }}/just" --bootstrap
    @"{{ python }}" scripts/install.py "$@"

# Create .venv with the packages for training, TensorBoard, the notebook and the server
setup: (_env "tensorboard" "plots" "offline" "notebook" "serve")

# Create .venv with the development tools
install-dev: (_env "dev")

# Train a small model on a small text and sample from it: a few minutes
[no-exit-message]
demo *ARGS: (_env "tensorboard" "plots")
    @"{{ python }}" -m llm_from_scratch.cli.demo "$@"

# Each test file runs in one worker; the longest files start first. Three workers, because tests also wait for the
# processes that they start.
workers := "-n 3 --dist=loadfile --no-loadscope-reorder"
# Bytecode is written even if the environment forbids it: otherwise every worker and every process compiles all files.
pytest := 'PYTHONDONTWRITEBYTECODE= "' + python + '" -m pytest ' + workers

# Run the tests, one case of each behaviour: about 4 minutes
[no-exit-message]
test *ARGS: (_env "dev")
    @{{ pytest }} "$@"

# Run every test that needs no GPU and no network: up to 25 minutes
[no-exit-message]
test-all *ARGS: (_env "dev")
    @{{ pytest }} -m "not gpu and not network" "$@"

# Run the tests with another version of torch (./just test-torch 2.15.0), in a temporary environment
[no-exit-message]
test-torch VERSION *ARGS: (_env "dev")
    @version=$1; shift; exec "{{ python }}" scripts/test_torch.py "$version" {{ workers }} "$@"

# Run the tests with a coverage report
[no-exit-message]
test-cov *ARGS: (_env "dev")
    @"{{ python }}" -m pytest --cov=llm_from_scratch --cov-report=term-missing:skip-covered "$@"

# Run the crash tests: kills, power cuts, flipped bits, hostile files (--prove: check that they detect defects)
[no-exit-message]
storm *ARGS: (_env "dev")
    @"{{ python }}" -m llm_from_scratch.tests.faults.storm "$@"

# Format the code
[no-exit-message]
format: (_env "dev")
    @"{{ python }}" -m black .
    @"{{ python }}" -m ruff check --fix .

# Check format, style and types
[no-exit-message]
lint: (_env "dev")
    @"{{ python }}" -m black --check .
    @"{{ python }}" -m ruff check .
    @"{{ python }}" -m mypy

# Format, lint and test: every commit must pass
pre-commit: format lint test

# Tokenize a text (a file, a folder or a built-in source) into data/processed
[no-exit-message]
prepare-data FILE *ARGS: (_env "tensorboard" "plots" "offline")
    @{{ first }}; exec "{{ bin }}/llm-prepare" "$first" "$@"

# Train configs/default.yaml on the most recently prepared data
[no-exit-message]
train *ARGS: (_env "tensorboard" "plots")
    @exec "{{ bin }}/llm-train" default "$@"

# A short run: 5 epochs, small batch, on the most recently prepared data
[no-exit-message]
train-quick *ARGS: (_env "tensorboard" "plots")
    @exec "{{ bin }}/llm-train" quick --epochs=5 --batch_size=8 --out_dir=out-quick "$@"

# Train configs/default.yaml for 20 epochs of the most recently prepared data; stops if the val loss no longer improves
[no-exit-message]
train-full *ARGS: (_env "tensorboard" "plots")
    @exec "{{ bin }}/llm-train" default --epochs=20 --early_stopping_patience=5 --out_dir=out-full "$@"

# Train with your own preset file
[no-exit-message]
train-with-config FILE *ARGS: (_env "tensorboard" "plots")
    @{{ first }}; exec "{{ bin }}/llm-train" "$first" "$@"

# Continue the text you type: MODEL is an out_dir, a step directory or a ckpt.pt
[no-exit-message]
generate MODEL *ARGS: _env
    @{{ first }}; exec "{{ bin }}/llm-generate" --interactive --checkpoint="$first" "$@"

# Serve a trained model and the playground: MODEL is an out_dir, a step directory or a ckpt.pt
[no-exit-message]
serve MODEL *ARGS: (_env "serve")
    @{{ first }}; exec "{{ bin }}/llm-serve" --checkpoint="$first" "$@"

# Show the curves of all runs in the browser
[no-exit-message]
tensorboard *ARGS: (_env "tensorboard")
    @logs=$("{{ python }}" scripts/housekeeping.py logs) && exec "{{ python }}" -m tensorboard.main --logdir_spec="$logs" "$@"

# Build the documentation as a site in build/site
docs: (_env "docs")
    @NO_MKDOCS_2_WARNING=1 "{{ python }}" -m mkdocs build --quiet
    @echo "open {{ root }}/build/site/index.html"

# Open the tour notebook
[no-exit-message]
notebook *ARGS: (_env "notebook")
    @exec "{{ python }}" -m notebook --notebook-dir=notebooks "$@"

# Show the GPU that PyTorch uses
[no-exit-message]
check-gpu: _env
    @exec "{{ python }}" scripts/check_gpu.py

# Time the training step
[no-exit-message]
bench *ARGS: _env
    @exec "{{ bin }}/llm-bench" "$@"

# Count the lines of the eight files to read first
[no-exit-message]
loc:
    @sh "{{ root }}/just" --bootstrap
    @"{{ python }}" scripts/housekeeping.py loc

# Delete caches and build files
[no-exit-message]
clean:
    @sh "{{ root }}/just" --bootstrap
    @"{{ python }}" scripts/housekeeping.py clean

# Delete runs, .bin files, data/processed and data/cache. Lists them and asks first (--yes: does not ask)
[no-exit-message]
clean-all *ARGS:
    @sh "{{ root }}/just" --bootstrap
    @"{{ python }}" scripts/housekeeping.py clean-all "$@"
