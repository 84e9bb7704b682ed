"""Which runner of Apache Beam does the work, and how it is told. Imports Beam when a pipeline is made, not before."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from recjax.core.errors import ConfigError

RUNNERS = {
    "direct": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "dask": "apache_beam.runners.dask.dask_runner.DaskRunner",
    "portable": "PortableRunner",
    "dataflow": "DataflowRunner",
}


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Who runs the pipelines: a name of `RUNNERS`, and options in Beam's own words ("--flink_master=host:8081")."""

    name: str = "direct"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RUNNERS:
            raise ConfigError(f"no runner {self.name!r}", expected=", ".join(RUNNERS))
        if importlib.util.find_spec("apache_beam") is None:
            raise ConfigError("apache-beam is not installed", mend="pip install 'recjax[beam]' (Python 3.11)")

    def pipeline(self) -> Any:
        """An empty pipeline, which runs at the end of a `with`."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        # Functions of this package are sent by name: workers have it installed.
        options = PipelineOptions([*self.options, "--pickle_library=cloudpickle"])
        return beam.Pipeline(runner=RUNNERS[self.name], options=options)
