"""Many runs: sweeps over settings, scaling laws over sizes and budgets."""
