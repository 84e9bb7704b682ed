"""From a data directory to batches: readers, vocabulary, examples, feeding. numpy, polars and grain; no model code."""
