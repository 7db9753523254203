"""One page about runs: what their folders hold, read (``history``), drawn (``charts``) and written (``page``)."""
