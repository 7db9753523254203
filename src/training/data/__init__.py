"""From shards and csv files to batches on the device, in an order fixed by a seed, which a checkpoint resumes."""
