"""Run: which program a step runs, what is kept between steps."""
