"""Many runs: sweeps over settings, ladders of sizes and budgets."""
