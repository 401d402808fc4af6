"""The toy world, in which the whole method runs on small hardware."""
