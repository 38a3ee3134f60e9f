"""nanoGPT's training script: `python train.py [config/PRESET.py] [--key=value ...]`.

Settings: src/llm_from_scratch/config.py. Loop: src/llm_from_scratch/training/trainer.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from llm_from_scratch.machine.extras import stop_without_required  # noqa: E402

stop_without_required()

from llm_from_scratch.cli.train import main_nanogpt  # noqa: E402

if __name__ == "__main__":
    sys.exit(main_nanogpt())
