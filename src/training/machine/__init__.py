"""What the machine gives a process, and what becomes of it where that is little. Works without torch."""
