"""Freezes a trained transformer to ONNX graphs, checks them against PyTorch, and writes the artifact that is served."""
