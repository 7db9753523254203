"""Training: the task, the optimizer step, the loop over epochs, its reports and its saves."""
