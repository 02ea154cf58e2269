"""Transduce's service: encoder-decoder transformers behind HTTP, on ONNX Runtime, with continuous batching.

It reads an artifact (see `service.artifact`) and knows nothing of how it was trained or exported.
"""

__version__ = "0.1.0"
