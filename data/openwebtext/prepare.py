"""OpenWebText in GPT-2 tokens: streams it and writes train.bin (about 17 GB) and val.bin next to this file.

Needs the library datasets (pip install -e '.[data]'). Encodes on all cores, or --workers=N.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

from llm_from_scratch.cli.common import run  # noqa: E402
from llm_from_scratch.data.nanogpt import prepare_openwebtext  # noqa: E402
from llm_from_scratch.errors import UserError  # noqa: E402


def main(argv: list[str]) -> None:
    workers = None
    for word in argv:
        key, _, value = word.partition("=")
        if key != "--workers" or not value.isdecimal():
            raise UserError(f"unknown argument {word!r}: expected nothing, or --workers=N")
        workers = int(value)
    prepare_openwebtext(HERE, workers)


if __name__ == "__main__":
    sys.exit(run(main))
