"""The processes of a run: their ranks, how they meet and communicate; signals, failures and hangs."""
