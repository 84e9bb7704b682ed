"""recjax: recommendation and search models in JAX, from a log of interactions to an exported bundle."""

__version__ = "0.1.0.dev0"
