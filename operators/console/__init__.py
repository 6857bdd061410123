"""``python -m operators sql``: scripts of SQL as jobs, and a shell.

``command.py`` is the command line, ``shell.py`` the shell; ``running.py`` runs what either is given, and ``screen.py``
shows it.
"""
