"""`python -m llm_from_scratch` is the command gptsmith."""

import sys

from .cli.gptsmith import main

if __name__ == "__main__":
    sys.exit(main())
