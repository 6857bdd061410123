"""The demo: a windowed job over real flights that is killed again and again, and whose output is right.

``pipeline.py`` is the job and the SQL query that says the same,
``worker.py`` the process that is killed, ``supervisor.py`` what kills and restarts it,
``compare.py`` the judge, ``screen.py`` what is shown, ``command.py`` the whole story.
"""
