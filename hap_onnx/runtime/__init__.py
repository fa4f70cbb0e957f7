"""Whole models in onnxruntime: their outputs, quality, soundness and latency."""
