"""The trainer: the published flags, files and log line around the method of ``drrho_clip``.

Doors are ``main.py``, ``check_data.py`` and ``check_cache.py``; ``run.py`` reads like a table of contents.
"""
