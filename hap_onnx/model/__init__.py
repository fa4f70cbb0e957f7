"""The ONNX side: models are loaded, checked, normalised, measured and written here."""
