"""Profiles, the demo model, and what it takes to deploy."""
