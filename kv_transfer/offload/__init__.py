"""KV blocks beyond the engine's own memory: tiers, what each keeps, and the stack that they make."""
