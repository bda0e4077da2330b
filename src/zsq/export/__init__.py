"""Files for runtimes, and their check against the simulation."""
