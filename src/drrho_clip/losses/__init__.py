"""The losses behind one interface: ``interface`` says what goes in and out, ``registry`` which there are."""
