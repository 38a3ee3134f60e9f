"""llm-plan: what a run would take, before it starts; llm-train --dry_run under a name of its own."""

from __future__ import annotations

import sys

from .train import main_plan as main

if __name__ == "__main__":
    sys.exit(main())
