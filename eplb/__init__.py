"""Expert parallelism: which rank holds which experts, and when that changes."""
