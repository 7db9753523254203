"""All that a run is, on disk: saving beside training, finding what is complete, resuming, the run's folder."""
