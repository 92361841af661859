"""Prefill workers: compute prompts in chunks, and hold their KV under leases until it has been fetched."""
