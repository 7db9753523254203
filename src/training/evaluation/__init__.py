"""Retrieval and zero-shot accuracy, on all ranks at once."""
