"""`python -m llm_from_scratch` is the command gptsmith."""

from .cli.gptsmith import main

raise SystemExit(main())
