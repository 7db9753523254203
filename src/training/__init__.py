"""The trainer: the published flags, files and log line around the method of ``drrho_clip``.

Doors are ``main.py`` and the programs beside it, such as ``check_data.py`` and ``check_reference.py``; ``run.py``
reads like a table of contents.
"""
