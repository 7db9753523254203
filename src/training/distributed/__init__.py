"""The processes of a run: who each is, how they meet, what they tell each other; signals, failures and hangs."""
