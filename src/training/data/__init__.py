"""From shards and csv files to batches on the device, in an order that a seed decides and a checkpoint resumes."""
