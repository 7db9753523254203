"""Builds the target, the frozen reference and the captioning model with open_clip, and finds their weights."""
