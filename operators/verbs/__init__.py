"""The verbs of a `DataStream`, one mixin per family."""
