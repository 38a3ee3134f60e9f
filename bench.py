"""nanoGPT's benchmark script: `python bench.py [--profile=True] [--key=value ...]`.

It runs src/llm_from_scratch/cli/bench.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from llm_from_scratch.machine.extras import stop_without_required  # noqa: E402

stop_without_required()

from llm_from_scratch.cli.bench import main_nanogpt  # noqa: E402

if __name__ == "__main__":
    sys.exit(main_nanogpt())
