"""Tandem: disaggregated prefill/decode serving for large language models.

Packages, in the one direction in which they import each other::

    core <- kernels <- kv_transfer <- engine <- {prefill, decode} <- cluster
"""

__version__ = "0.1.0"
