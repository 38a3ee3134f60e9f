# Recipes of this project. `./just RECIPE` needs python3 alone; `just RECIPE` does for those who have just.
# Everything lives in .venv and is called there by path: whatever environment is active does not matter.
# Arguments after a recipe's own are passed on: `./just demo --max_iters=100`.

set positional-arguments

unexport VIRTUAL_ENV
unexport PYTHONHOME

root := justfile_directory()
bin := root / ".venv" / if os_family() == "windows" { "Scripts" } else { "bin" }
python := bin / "python"
here := invocation_directory()

[private]
default:
    @"{{ just_executable() }}" --justfile "{{ justfile() }}" --list --unsorted

# .venv with what these extras need; quick when it is there already
[private]
_env *EXTRAS:
    @sh "{{ root }}/just" --bootstrap
    @"{{ python }}" scripts/install.py "$@"

# Make .venv with what training, TensorBoard and the notebook need
setup: (_env "tensorboard" "plots" "notebook")

# Make .venv with the development tools
install-dev: (_env "dev")

# Train a small model on a small text and read from it: a few minutes
demo *ARGS: (_env "tensorboard" "plots")
    @"{{ python }}" -m llm_from_scratch.cli.demo "$@"

# Run the tests
test *ARGS: (_env "dev")
    @"{{ python }}" -m pytest "$@"

# Run the tests and report which lines they reach
test-cov *ARGS: (_env "dev")
    @"{{ python }}" -m pytest --cov=llm_from_scratch --cov-report=term-missing:skip-covered "$@"

# Format the code
format: (_env "dev")
    @"{{ python }}" -m black .
    @"{{ python }}" -m ruff check --fix .

# Check format, style and types
lint: (_env "dev")
    @"{{ python }}" -m black --check .
    @"{{ python }}" -m ruff check .
    @"{{ python }}" -m mypy

# What a commit must pass: format, lint, test
pre-commit: format lint test

# Turn a text (file, folder, or a known name) into training data in data/processed
prepare-data FILE *ARGS: (_env "tensorboard" "plots")
    @f=$1 && shift && if [ -e "{{ here }}/$f" ]; then f="{{ here }}/$f"; fi && "{{ bin }}/llm-prepare" "$f" "$@"

# Train configs/default.yaml on the newest data in data/processed
train *ARGS: (_env "tensorboard" "plots")
    @"{{ python }}" scripts/newest.py -- "{{ bin }}/llm-train" configs/default.yaml "$@"

# A short training run to try things out: 5 epochs, small batch, newest data
train-quick *ARGS: (_env "tensorboard" "plots")
    @"{{ python }}" scripts/newest.py -- "{{ bin }}/llm-train" configs/quick.yaml --epochs=5 --batch_size=8 "$@"

# Train with a configuration file
train-with-config FILE *ARGS: (_env "tensorboard" "plots")
    @f=$1 && shift && if [ -e "{{ here }}/$f" ]; then f="{{ here }}/$f"; fi && "{{ bin }}/llm-train" "$f" "$@"

# Talk to a trained model: MODEL is an out_dir, a step directory or a ckpt.pt
generate MODEL *ARGS: (_env "tensorboard" "plots")
    @m=$1 && shift && if [ -e "{{ here }}/$m" ]; then m="{{ here }}/$m"; fi && "{{ bin }}/llm-generate" --interactive --checkpoint="$m" "$@"

# Time the training step
bench *ARGS: (_env "tensorboard" "plots")
    @"{{ bin }}/llm-bench" "$@"
