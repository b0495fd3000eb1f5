"""Tools for a person: comparing solvers, looking at a point, checking derivatives, the demo, the command line."""
