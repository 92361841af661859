"""Token in, token out: block pool, model, sampler. Knows tokens, not phases; prefill and decode compose it."""
