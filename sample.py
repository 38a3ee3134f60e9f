"""nanoGPT's sampling script: `python sample.py [--out_dir=out] [--start=...] [--key=value ...]`.

Settings: src/llm_from_scratch/cli/sample.py. Generator: src/llm_from_scratch/generation/generator.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from llm_from_scratch.machine.extras import stop_without_required  # noqa: E402

stop_without_required()

from llm_from_scratch.cli.sample import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
