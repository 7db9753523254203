"""How rows of the sample state are kept: ``fixed_point`` in 16 bits, ``host_state`` in host memory."""
