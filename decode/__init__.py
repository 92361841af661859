"""Decode workers: fetch prompts' KV, and stream tokens. Alone, a decode worker is the colocated baseline."""
