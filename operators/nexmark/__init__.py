"""The Nexmark benchmark: a stream of auctions, and the queries of the suite over it.

``model.py`` has the three kinds of events, ``draws.py`` and ``generator.py`` make them, ``dataset.py``
writes them to Parquet. ``merge.py`` and ``source.py`` read them, ``counter.py`` counts them, ``queries.py`` is the
registry of queries, ``run.py`` runs one. ``command.py`` is the command line, ``screen.py`` its progress bar.
"""
