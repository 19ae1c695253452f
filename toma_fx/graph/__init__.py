"""FX graphs: reading nodes, the one door for changes, verification."""
