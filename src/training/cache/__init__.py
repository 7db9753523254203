"""What a frozen model computes once: reference features and synthetic captions, on disk, read by row."""
