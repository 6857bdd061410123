"""What users test their own streams, pipelines, sources and sinks with; nothing here needs a test framework.

`StreamHarness` (``harness.py``): a stream whose source and clock is the test: push, checkpoint, kill, look.
`check_exactly_once` (``exactly_once.py``): a whole pipeline, killed and stalled at every step of the protocol.
`check_source` (``check_source.py``): whether a source keeps what the `Source` protocol asks of it.
`ends_after` (``ending.py``): a source that never ends, ended.

To test a `Sink` of your own, run it behind any source::

    def pipeline(context, place):
        context.from_batches(batches, name="in").sink(MySink(place / "out"), name="out")

    print(check_exactly_once(pipeline, read=lambda place: read_my_output(place / "out")))

and a `Source` of your own::

    check_source(lambda: MySource("events"))
    check_exactly_once(lambda context, place: context.from_source(MySource("events")).write_parquet(place / "out"))
"""

from operators.testing.check_source import SourceContractError, check_source
from operators.testing.ending import ends_after
from operators.testing.exactly_once import ExactlyOnceError, ExactlyOnceReport, check_exactly_once
from operators.testing.harness import Build, StreamHarness

__all__ = [
    "Build",
    "ExactlyOnceError",
    "ExactlyOnceReport",
    "SourceContractError",
    "StreamHarness",
    "check_exactly_once",
    "check_source",
    "ends_after",
]
