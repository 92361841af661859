"""Models: what a checkpoint's config.json means (`spec`), the forward pass (`decoder`), names in checkpoints
(`names`)."""
