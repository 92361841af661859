"""A node's supervisor: health and metrics of all its ranks on one port."""
