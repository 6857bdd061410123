"""The Nexmark benchmark: a stream of auctions, and the queries of the suite over it.

``model.py`` has the three kinds of events, ``draws.py`` and ``generator.py`` make them, ``dataset.py``
writes them to Parquet, ``live.py`` is a source that makes them as they are read. ``merge.py`` and ``source.py`` read
the files, ``counter.py`` counts the events, ``queries.py`` is the registry of queries, ``run.py`` runs one.
``command.py`` is the command line, ``screen.py`` its progress bar.
"""
