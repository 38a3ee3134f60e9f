"""llm-plan: estimates time, memory and finish time of a run. The same as llm-train --dry_run."""

from __future__ import annotations

import sys

from .train import main_plan as main

if __name__ == "__main__":
    sys.exit(main())
