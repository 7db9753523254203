"""What a frozen model computes once, on disk, read by row: reference features and synthetic captions."""
