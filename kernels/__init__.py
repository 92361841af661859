"""Numerics: one operation a file, each with its plain torch `reference`. `oracle` says which version serves where."""
