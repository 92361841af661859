"""Ids, configuration, errors, clock, wire messages, hashing, metrics and logs. Imports neither torch nor ray."""
