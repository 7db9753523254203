"""From the command line to one frozen configuration: what each flag may be, and what flags mean together.

Nothing here imports torch, so that a refusal is printed at once.
"""
