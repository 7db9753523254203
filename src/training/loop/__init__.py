"""Training: the task, one optimizer step, the loop over epochs, what it reports and when it saves."""
