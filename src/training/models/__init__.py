"""The target, the frozen reference and the captioning model, built by open_clip; where weights come from."""
