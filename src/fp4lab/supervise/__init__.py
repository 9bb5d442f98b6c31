"""A run's life: one worker process, forked from a preloaded server, watched, recorded and ended."""
