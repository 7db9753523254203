"""A trained model as files that other libraries open: open_clip, transformers, timm, ONNX."""
