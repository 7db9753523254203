"""The page: ``document`` puts it together from ``parts``, and ``gallery`` has its pictures."""
