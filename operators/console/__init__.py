"""``python -m operators sql``: scripts of SQL as jobs, and a shell.

``command.py`` is the command line, ``shell.py`` the shell; ``running.py`` runs what either is given, ``output.py``
prints rows and ``screen.py`` progress.
"""
