"""The engine: configuration, sharding, state, steps, checkpoints. It knows no recommender words."""
