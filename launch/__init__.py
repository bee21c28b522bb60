"""The command line and the starting of processes."""
