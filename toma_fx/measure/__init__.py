"""Pictures with and without acceleration, compared and timed."""
