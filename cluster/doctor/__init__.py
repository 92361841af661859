"""`tandem doctor`: what a cluster is made of, and how fast KV moves between the places of its workers."""
