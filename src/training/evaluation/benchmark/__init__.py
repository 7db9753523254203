"""The DataComp benchmark's sets and metrics: what they are, where they lie, what is computed on them."""
