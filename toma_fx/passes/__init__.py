"""Graph passes that carry out a plan."""
